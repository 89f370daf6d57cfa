"""python/nibble on numpy and DLPack arrays. Needs numpy and a library:

    NIBBLE_LIBRARY=build/libnibble.so NIBBLE_TOOL=build/nibble python tests/python/test_nibble.py
"""

import ctypes
import os
import random
import re
import subprocess
import sys
import threading
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
if "NIBBLE_LIBRARY" in os.environ:  # the package of this tree; else the one that is installed
    sys.path.insert(0, str(ROOT / "python"))

import numpy as np  # noqa: E402

import nibble  # noqa: E402
from awq_tensors import AwqTensors  # noqa: E402
from nibble import _library as native  # noqa: E402
from nibble._shards import groups_met, shard_group_size  # noqa: E402
from nibble.plan import choose_plan, slot_of  # noqa: E402

MALFORMED_CALLS = 10_000
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}


def rows(m, k, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).standard_normal((m, k)).astype(dtype)


def through_the_c_abi(tensors, x, mode, granularity, asymmetric):
    """nibble_weight_create and nibble_gemm, by hand: what the package must equal bit for bit."""
    lib = native.lib
    lib.nibble_weight_create.restype = native.Status
    lib.nibble_gemm.restype = native.Status
    desc = native.WeightDesc(
        k=tensors.k, n=tensors.n, group_size=tensors.group_size, layout=0, scale_dtype=native.F16,
        qweight=tensors.qweight.ctypes.data, scales=tensors.scales.ctypes.data,
        qzeros=None if tensors.qzeros is None else tensors.qzeros.ctypes.data,
        bias=None if tensors.bias is None else tensors.bias.ctypes.data, bias_dtype=native.F32)
    weight = ctypes.c_void_p()
    native.check(lib.nibble_weight_create(ctypes.byref(weight), ctypes.byref(desc), 1))
    kind = native.F32 if x.dtype == np.float32 else native.F16
    problem = native.Problem(x.shape[0], tensors.n, tensors.k, tensors.group_size, mode, kind, kind,
                             granularity, asymmetric, 1)
    plan = native.Plan()
    native.check(lib.nibble_gemm_plan(plan, problem, None))
    scratch = np.empty(lib.nibble_gemm_workspace_bytes(plan) + 64, np.uint8)
    y = np.empty((x.shape[0], tensors.n), x.dtype)
    given = native.Input(x.ctypes.data, tensors.k, 0, 0, None, None)
    target = native.Target(weight, y.ctypes.data, tensors.n)
    native.check(lib.nibble_gemm(ctypes.byref(plan), ctypes.byref(given), ctypes.byref(target), 1,
                                 ctypes.c_void_p(-(-scratch.ctypes.data // 64) * 64)))
    lib.nibble_weight_destroy(weight)
    return y


class Products(unittest.TestCase):
    def test_every_mode_equals_the_c_abi_bit_for_bit(self):
        for seed, (bias, zeros) in enumerate([(False, True), (True, False), (True, True)]):
            tensors = AwqTensors(seed=seed, bias=bias, zeros=zeros)
            weight = nibble.pack_awq(*tensors.tensors())
            for dtype in (np.float32, np.float16):
                for m in (1, 5, 40):
                    x = rows(m, tensors.k, dtype)
                    for mode in nibble.Mode.W4A16, nibble.Mode.W4A8, nibble.Mode.W4A4:
                        for scales in range(3):
                            asymmetric = int(mode == nibble.Mode.W4A4 and scales == 2)
                            spec = nibble.Spec(mode, nibble.Granularity(scales), not asymmetric)
                            np.testing.assert_array_equal(
                                nibble.linear(x, weight, spec),
                                through_the_c_abi(tensors, x, mode, scales, asymmetric))

    def test_w4a16_is_the_product(self):
        tensors = AwqTensors(bias=True)
        weight, x = nibble.pack_awq(*tensors.tensors()), rows(7, 256)
        y = nibble.linear(x, weight, "w4a16")
        self.assertLess(np.abs(y - tensors.expected(x)).max(), 1e-5)
        dense = nibble.dequantize(*tensors.tensors()[:4])
        np.testing.assert_array_equal(dense, tensors.dense())  # exact

    def test_integer_sums_are_exact(self):
        tensors = AwqTensors(bias=True)
        weight, x = nibble.pack_awq(*tensors.tensors()), rows(7, 256)
        for mode in "w4a8", "w4a4":
            for granularity in "token", "group", "tensor":
                codes, scales, sums = nibble.quantize(x, 64, mode, granularity=granularity)
                np.testing.assert_array_equal(sums, codes.reshape(7, 4, 64).sum(2, dtype=np.int32))
                steps = np.repeat(scales, 7) if granularity == "tensor" and scales.size == 1 \
                    else scales
                y = nibble.linear(x, weight, mode, granularity=granularity)
                self.assertLess(np.abs(y - tensors.quantized(codes, steps)).max(), 2e-5)

    def test_static_scales_clip_and_wide_groups(self):
        tensors = AwqTensors()
        weight, x = nibble.pack_awq(*tensors.tensors()), rows(3, 256)
        one = nibble.linear(x, weight, "w4a8", granularity="static-tensor", static_scales=[0.03])
        four = nibble.linear(x, weight, "w4a8", granularity="static-group",
                             static_scales=[0.03] * 4)
        np.testing.assert_allclose(one, four, rtol=1e-5, atol=1e-5)
        self.assertFalse(np.array_equal(nibble.linear(x, weight, clip=0.5),
                                        nibble.linear(x, weight)))
        wide = nibble.linear(x, weight, "w4a4", wide_groups=[1, 1, 1, 1])
        np.testing.assert_array_equal(wide, nibble.linear(x, weight, "w4a8", granularity="group"))
        narrow = nibble.linear(x, weight, "w4a4", wide_groups=[0, 0, 0, 0])
        np.testing.assert_array_equal(narrow, nibble.linear(x, weight, "w4a4"))

    def test_shapes(self):
        weight = nibble.pack_awq(*AwqTensors().tensors())
        self.assertEqual(nibble.linear(np.zeros((0, 256), np.float32), weight).shape, (0, 72))
        x = rows(6, 256)
        y = nibble.linear(x, weight)
        np.testing.assert_array_equal(nibble.linear(x.reshape(2, 3, 256), weight),
                                      y.reshape(2, 3, 72))
        np.testing.assert_array_equal(nibble.linear(x[0], weight), y[0])
        spread = np.zeros((6, 300), np.float32)
        spread[:, :256] = x
        np.testing.assert_array_equal(nibble.linear(spread[:, :256], weight), y)  # strided rows
        out = np.empty((6, 72), np.float16)
        self.assertIs(nibble.linear(x, weight, out=out), out)
        np.testing.assert_array_equal(out, y.astype(np.float16))

    def test_a_weight_is_bytes(self):
        weight, x = nibble.pack_awq(*AwqTensors(bias=True).tensors()), rows(3, 256)
        again = np.zeros(weight.memory.size + 64, np.uint8)
        start = -again.ctypes.data % 64
        copy = again[start:start + weight.memory.size]
        copy[:] = weight.memory
        other = nibble.Weight(copy)
        self.assertEqual((other.k, other.n, other.group_size), (256, 72, 64))
        np.testing.assert_array_equal(nibble.linear(x, other), nibble.linear(x, weight))

    def test_shards_of_rows_add_up(self):
        tensors = AwqTensors(k=384, group_size=128)
        x = rows(4, 384)
        whole = tensors.expected(x)
        for first in (192, 96, 128, 352):
            parts = []
            for k0, k1 in ((0, first), (first, 384)):
                g0 = k0 // 128
                g1 = g0 + groups_met(128, k0, k1 - k0)
                weight = nibble.pack_awq(tensors.qweight[k0:k1], tensors.qzeros[g0:g1],
                                         tensors.scales[g0:g1], 128, k_offset=k0)
                self.assertEqual(weight.group_size, shard_group_size(128, k0, k1 - k0))
                y = nibble.linear(x[:, k0:k1], weight, "w4a16")
                exact = x[:, k0:k1].astype(np.float64) @ tensors.dense()[k0:k1]
                self.assertLess(np.abs(y - exact).max(), 1e-5)
                parts.append(y)
            self.assertLess(np.abs(sum(parts) - whole).max(), 2e-5)
        with self.assertRaisesRegex(nibble.InvalidArgument, "k_offset.*pieces of 8"):
            nibble.pack_awq(tensors.qweight[8:200], tensors.qzeros[:2], tensors.scales[:2], 128,
                            k_offset=8)

    def test_threads_may_multiply_at_the_same_time(self):
        weight = nibble.pack_awq(*AwqTensors().tensors())
        x = [rows(m, 256, seed=m) for m in range(1, 9)]
        expected = [nibble.linear(each, weight) for each in x]
        wrong = []

        def work(index):
            for _ in range(50):
                if not np.array_equal(nibble.linear(x[index], weight), expected[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_kernels(self):
        weight, x = nibble.pack_awq(*AwqTensors().tensors()), rows(3, 256)
        self.assertIsNone(nibble.kernels()["w4a8_scalar"])
        np.testing.assert_array_equal(nibble.linear(x, weight, kernel="w4a8_scalar"),
                                      nibble.linear(x, weight))
        with self.assertRaisesRegex(nibble.NibbleError, "no_such_kernel"):
            nibble.linear(x, weight, kernel="no_such_kernel")


class DlpackOnly:
    """An array that has nothing but DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Elsewhere(DlpackOnly):
    def __dlpack_device__(self):
        return (2, 0)  # kDLCUDA


class Dlpack(unittest.TestCase):
    def test_it_is_read_and_written(self):
        tensors = AwqTensors(bias=True)
        x = rows(3, 256)
        weight = nibble.pack_awq(DlpackOnly(tensors.qweight), DlpackOnly(tensors.qzeros),
                                 DlpackOnly(tensors.scales), 64, DlpackOnly(tensors.bias))
        expected = nibble.linear(x, nibble.pack_awq(*tensors.tensors()))
        np.testing.assert_array_equal(nibble.linear(DlpackOnly(x), weight), expected)
        out = np.empty((3, 72), np.float32)
        nibble.linear(DlpackOnly(x), weight, out=DlpackOnly(out))
        np.testing.assert_array_equal(out, expected)

    def test_other_devices_are_refused(self):
        weight = nibble.pack_awq(*AwqTensors().tensors())
        with self.assertRaisesRegex(nibble.InvalidArgument, "x: expected memory of the CPU"):
            nibble.linear(Elsewhere(rows(3, 256)), weight)


class Malformed(unittest.TestCase):
    """Wrong calls raise exceptions that name the argument; none crashes."""

    def setUp(self):
        self.tensors = AwqTensors(bias=True)
        self.weight = nibble.pack_awq(*self.tensors.tensors())

    def test_named(self):
        x, t = rows(3, 256), self.tensors
        cases = [
            ("x", lambda: nibble.linear(x.astype(np.float64), self.weight)),
            ("x", lambda: nibble.linear(np.asfortranarray(x), self.weight)),
            ("x", lambda: nibble.linear(x[:, :200], self.weight)),
            ("x", lambda: nibble.linear(np.full((2, 256), np.nan, np.float32), self.weight)),
            ("x", lambda: nibble.linear([1.0] * 256, self.weight)),
            ("weight", lambda: nibble.linear(x, t.qweight)),
            ("mode", lambda: nibble.linear(x, self.weight, "w4a5")),
            ("clip", lambda: nibble.linear(x, self.weight, clip=1.5)),
            ("symmetric", lambda: nibble.linear(x, self.weight, symmetric=False)),
            ("out", lambda: nibble.linear(x, self.weight, out=np.empty((3, 71), np.float32))),
            ("static_scales", lambda: nibble.linear(x, self.weight, granularity="static-tensor")),
            ("qweight", lambda: nibble.pack_awq(t.qweight.astype(np.int64), *t.tensors()[1:])),
            ("qzeros", lambda: nibble.pack_awq(t.qweight, t.qzeros[:3], t.scales, 64)),
            ("scales", lambda: nibble.pack_awq(t.qweight, t.qzeros, t.scales.astype("f4"), 64)),
            ("bias", lambda: nibble.pack_awq(*t.tensors()[:4], t.bias[:-1])),
            ("group size", lambda: nibble.quantize(x, 100)),
            ("memory", lambda: nibble.Weight(self.weight.memory[:100])),
        ]
        for name, call in cases:
            with self.subTest(name), self.assertRaisesRegex((nibble.NibbleError, TypeError),
                                                            name.replace(" ", ".")):
                call()

    def test_w4a8_fp8_is_refused_on_cpus(self):
        x = rows(3, 256)
        for call in (lambda: nibble.linear(x, self.weight, "w4a8-fp8"),
                     lambda: nibble.quantize(x, 64, "w4a8-fp8")):
            with self.assertRaisesRegex(nibble.Unsupported, "w4a8-fp8.*CUDA devices only"):
                call()
        for granularity in "group", "static-group":
            with self.assertRaisesRegex(nibble.InvalidArgument, "granularity.*w4a8-fp8"):
                nibble.make_spec("w4a8-fp8", granularity, static_scales=[0.1] * (
                    granularity == "static-group"))
        spec = nibble.make_spec("w4a8-fp8")
        self.assertEqual((str(spec), int(spec.product_mode)), ("w4a8-fp8 token", 3))

    def test_random_calls_never_crash(self):
        choose = random.Random(20261123)
        refused = 0
        for _ in range(MALFORMED_CALLS):
            call, words = malformed(choose, self.tensors, self.weight)
            try:
                call()
            except (nibble.NibbleError, TypeError) as error:
                refused += 1
                self.assertRegex(str(error), words)
        self.assertGreater(refused, MALFORMED_CALLS * 8 // 10)


def worse(choose, array):
    """`array`, spoilt in one of many ways."""
    return choose.choice([
        lambda: (array > 0).astype(choose.choice([np.float64, np.int8, np.complex64])),
        lambda: np.asfortranarray(array) if array.ndim == 2 else array[::2],
        lambda: array[..., :choose.randrange(array.shape[-1])],
        lambda: array[..., ::-1],
        lambda: array[:choose.randrange(len(array))],
        lambda: np.repeat(array, 2, -1)[..., ::2],
        lambda: np.concatenate([array, array]),
        lambda: array[None],
        lambda: array.reshape(-1)[0],
        lambda: array.tolist(),
        lambda: array.view(">f4" if array.dtype.itemsize == 4 else ">f2"),
        lambda: None,
        lambda: "text",
        lambda: np.broadcast_to(array[:1], array.shape),
    ])()


def malformed(choose, tensors, weight):
    """A random call that is wrong, or may be, and what its message must name."""
    x = rows(choose.randrange(4), 256)
    kind = choose.randrange(5)
    if kind == 0:
        bad = worse(choose, rows(3, 256))
        return lambda: nibble.linear(bad, weight, choose.choice(["w4a16", "w4a8", "w4a4"])), "x"
    if kind == 1:
        names = ["qweight", "qzeros", "scales", "group_size", "bias"]
        arguments = list(tensors.tensors())
        index = choose.randrange(5)
        arguments[index] = choose.choice([0, -7, 3, 96, 10 ** 12]) if index == 3 \
            else worse(choose, arguments[index])
        # a qweight of other sizes is a legal weight that the others do not fit
        words = "|".join(names) if index in (0, 3) else names[index]
        return lambda: nibble.pack_awq(*arguments, k_offset=choose.choice([0, 0, 5])), \
            words + "|k_offset"
    if kind == 2:
        options = choose.choice([
            {"mode": choose.choice(["", "w8a8", None, 3])},
            {"granularity": choose.choice(["row", 7, "GROUP"])},
            {"clip": choose.choice([0.0, -1.0, 2.0, float("nan"), float("inf")])},
            {"granularity": "static-group",
             "static_scales": [0.1] * choose.choice([0, 1, 3, 5])},
            {"granularity": "static-tensor",
             "static_scales": [choose.choice([0.0, -1.0, float("inf"), float("nan"), 1e-40])]},
            {"mode": "w4a4", "wide_groups": [1] * choose.choice([1, 3, 5, 300])},
            {"mode": "w4a8", "wide_groups": [1] * 4},
            {"mode": choose.choice(["w4a16", "w4a8"]), "symmetric": False},
            {"kernel": choose.choice(["", "w4a8", "w4a16_scalar", "\0", "x" * 1000])},
            {"threads": choose.choice([1025, 2 ** 31 - 1])},
            {"out": worse(choose, np.empty((len(x), 72), np.float32)
                          if len(x) else np.empty((1, 72), np.float32))},
        ])
        names = list(options) + ["static", "group", "kernel", "activations"]
        return lambda: nibble.linear(x, weight, **options), "|".join(names)
    if kind == 3:
        memory = nibble.products.aligned_bytes(weight.memory.size)
        memory[:] = weight.memory
        for _ in range(choose.randrange(1, 4)):
            memory[choose.randrange(48)] ^= choose.randrange(1, 256)
        bad = choose.choice([memory, weight.memory[:choose.randrange(weight.memory.size)],
                             weight.memory[choose.randrange(1, 500):], tensors.qweight])
        return lambda: nibble.Weight(bad), "memory"
    size = choose.choice([0, -2, 3, 100, 257, 2 ** 40])
    return lambda: nibble.quantize(x, size, choose.choice(["w4a16", "w4a8"])), \
        "group.size|w4a16"


class Plans(unittest.TestCase):
    BLOCK = {"schema_version": 1, "layers": [
        {"qkv": {"mode": "w4a8", "granularity": "token"},
         "o": {"mode": "w4a4", "granularity": "group", "symmetric": False, "clip": 0.95,
               "wide_groups": {"of": 9, "groups": [0, 4]}},
         "gate_up": {"mode": "w4a8", "granularity": "static-tensor", "static_scales": [0.03125]},
         "down": {"mode": "w4a16"}}]}

    def test_slots(self):
        self.assertEqual(slot_of("model.layers.12.self_attn.k_proj"), (12, "qkv"))
        self.assertEqual(slot_of("model.language_model.layers.3.mlp.gate_up_proj"), (3, "gate_up"))
        self.assertIsNone(slot_of("lm_head"))

    def test_a_plan_is_read(self):
        plan = choose_plan(None, None, {"nibble": self.BLOCK})
        spec = plan.spec("model.layers.0.self_attn.o_proj")
        self.assertEqual(str(spec), "w4a4 group-asym clip 0.95 (2 of 9 groups int8)")
        self.assertEqual(spec.wide_groups, (1, 0, 0, 0, 1, 0, 0, 0, 0))
        self.assertEqual(plan.spec("model.layers.0.mlp.up_proj").static_scales, (0.03125,))
        with self.assertRaisesRegex(nibble.InvalidArgument, "layers.1"):
            plan.spec("model.layers.1.mlp.up_proj")

    def test_one_mode_for_all(self):
        plan = choose_plan("w4a8", None, {"nibble": self.BLOCK})
        self.assertEqual(str(plan.spec("model.layers.0.mlp.down_proj")), "w4a8 group")
        self.assertEqual(str(plan.spec("model.layers.0.mlp.up_proj")), "w4a8 token")
        fp8 = choose_plan("w4a8-fp8", None, {})
        self.assertEqual(str(fp8.spec("model.layers.0.mlp.down_proj")), "w4a8-fp8 token")
        self.assertEqual(str(choose_plan("w4a4", None, {}).spec("model.layers.0.mlp.up_proj")),
                         "w4a4 group-asym")

    def test_wrong_blocks_name_the_key(self):
        import copy
        spoil = {
            "schema_version": lambda b: b.update(schema_version=2),
            "layers": lambda b: b.update(layers={}),
            r"layers\[0\].qkv.mode": lambda b: b["layers"][0]["qkv"].update(mode="w9"),
            r"layers\[0\].o.mode": lambda b: b["layers"][0]["o"].update(mode="w4a8-fp8"),
            r"qkv: unknown key 'x'": lambda b: b["layers"][0]["qkv"].update(x=1),
            r"o.wide_groups.groups":
                lambda b: b["layers"][0]["o"]["wide_groups"].update(groups=[9]),
            r"o.clip": lambda b: b["layers"][0]["o"].update(clip=2),
            r"gate_up.static_scales": lambda b: b["layers"][0]["gate_up"].update(static_scales=[]),
            r"layers\[0\].down": lambda b: b["layers"][0].pop("down"),
        }
        for pattern, change in spoil.items():
            block = copy.deepcopy(self.BLOCK)
            change(block)
            with self.subTest(pattern), self.assertRaisesRegex(nibble.InvalidArgument, pattern):
                choose_plan("auto", None, {"nibble": block})
        with self.assertRaisesRegex(nibble.InvalidArgument, "no plan"):
            choose_plan("auto", None, {})


class Program(unittest.TestCase):
    def run_python(self, *arguments, **environment):
        return subprocess.run([sys.executable, *arguments], env={**ENVIRONMENT, **environment},
                              capture_output=True, text=True, timeout=120)

    def test_import_is_quick_and_brings_neither_numpy_nor_torch(self):
        # the time of this process alone: others may keep the machine busy
        code = ("import time, sys; start = time.process_time(); import nibble; "
                "print(time.process_time() - start, 'numpy' in sys.modules, "
                "'torch' in sys.modules)")
        runs = [self.run_python("-c", code) for _ in range(3)]
        self.assertEqual(runs[0].returncode, 0, runs[0].stderr)
        self.assertEqual({run.stdout.split(maxsplit=1)[1] for run in runs}, {"False False\n"})
        quickest = min(float(run.stdout.split()[0]) for run in runs)
        print(f"import nibble: {quickest * 1e3:.0f} ms")
        self.assertLess(quickest, 0.2)

    def test_the_tool_runs(self):
        run = self.run_python("-m", "nibble", "--version")
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn(nibble.__version__, run.stdout)
        run = self.run_python("-m", "nibble", "--version", NIBBLE_TOOL="/no/such/tool")
        self.assertEqual(run.returncode, 3)
        self.assertIn("/no/such/tool", run.stderr)

    def test_a_wrong_library_is_named(self):
        for path in "/no/such/libnibble.so", sys.executable:
            run = self.run_python("-c", "import nibble", NIBBLE_LIBRARY=path)
            self.assertRegex(run.stderr, f"LibraryNotFound.*{re.escape(path)}")


if __name__ == "__main__":
    unittest.main(verbosity=2)
