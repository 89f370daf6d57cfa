"""torch.ops.nibble and nibble.torch, on the CPU and, where there is one and the library was built
for it, a GPU. Needs torch and a library:

    NIBBLE_LIBRARY=build/libnibble.so python tests/python/test_torch.py
"""

import copy
import ctypes
import os
import random
import sys
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
if "NIBBLE_LIBRARY" in os.environ:  # the package of this tree; else the one that is installed
    sys.path.insert(0, str(ROOT / "python"))

import torch  # noqa: E402

import c_abi  # noqa: E402
import nibble  # noqa: E402
from awq_models import dequantize, random_linear  # noqa: E402
from nibble._library import lib  # noqa: E402
from nibble.torch import AwqLinear, pack_awq, shard_group_size  # noqa: E402

MALFORMED_CALLS = 10_000
K, N, GROUP = 256, 72, 64
OPS = torch.ops.nibble


def has_gpu():
    count = ctypes.c_int32()
    return torch.cuda.is_available() and lib.nibble_cuda_device_count(count).code == 0


GPU = has_gpu()
needs_gpu = unittest.skipUnless(GPU, "needs a GPU and a library built with NIBBLE_CUDA=ON")


def weight(k=K, n=N, group=GROUP, bias=False, seed=0, scale_dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    parts = random_linear(k, n, group, generator, scale_dtype)
    parts["bias"] = torch.randn(n, generator=generator) if bias else None
    return parts


def packed(parts, group=GROUP, device="cpu"):
    moved = {name: part if part is None else part.to(device) for name, part in parts.items()}
    return pack_awq(moved["qweight"], moved["qzeros"], moved["scales"], group, moved["bias"])


def rows(*shape, dtype=torch.float32, seed=1, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def arguments(spec, n=N, group=GROUP, k=K, device="cpu"):
    static = torch.tensor(spec.static_scales, device=device) if spec.static_scales else None
    wide = torch.tensor(spec.wide_groups, dtype=torch.uint8, device=device) \
        if any(spec.wide_groups) else None
    return (n, group, int(spec.product_mode), int(spec.granularity), spec.symmetric, spec.clip,
            static, wide)


SPECS = [nibble.make_spec("w4a16"), nibble.make_spec("w4a8"), nibble.make_spec("w4a4"),
         nibble.make_spec("w4a8", "group", clip=0.9), nibble.make_spec("w4a8", "tensor"),
         nibble.make_spec("w4a4", "token", symmetric=True),
         nibble.make_spec("w4a8", "static-tensor", static_scales=[0.03]),
         nibble.make_spec("w4a8", "static-group", static_scales=[0.03, 0.02, 0.04, 0.03]),
         nibble.make_spec("w4a4", wide_groups=[0, 1, 0, 1])]


class Operators(unittest.TestCase):
    def test_linear_equals_the_c_abi_bit_for_bit(self):
        for bias in False, True:
            for scale_dtype in torch.float16, torch.bfloat16:
                parts = weight(bias=bias, scale_dtype=scale_dtype)
                block = packed(parts)
                for dtype in torch.float32, torch.float16, torch.bfloat16:
                    for m in 1, 3, 40:
                        x = rows(m, K, dtype=dtype)
                        for spec in SPECS:
                            y = OPS.linear(x, block, *arguments(spec))
                            expected = c_abi.product(x, parts["qweight"], parts["qzeros"],
                                                     parts["scales"], GROUP, parts["bias"], spec)
                            self.assertEqual(y.dtype, dtype)
                            self.assertTrue(torch.equal(y, expected), str(spec))

    def test_linear_is_the_product(self):
        parts, x = weight(bias=True), rows(5, K)
        exact = x.double() @ dequantize(parts["qweight"], parts["qzeros"], parts["scales"], GROUP)
        y = OPS.linear(x, packed(parts), *arguments(SPECS[0]))
        self.assertLess((y - exact - parts["bias"]).abs().max().item(), 1e-5)

    def test_the_halves_make_the_whole(self):
        block, x = packed(weight(bias=True)), rows(2, 3, K)
        for spec in SPECS[1:4] + SPECS[5:]:
            n, group, mode, granularity, *rest = arguments(spec)
            codes, scales = OPS.quantize(x, group, mode, granularity, *rest)
            self.assertEqual(codes.shape, x.shape)
            y = OPS.linear_quantized(codes, scales, block, n, group, mode, granularity, x.dtype)
            self.assertTrue(torch.equal(y, OPS.linear(x, block, *arguments(spec))), str(spec))

    def test_the_default_dtype_does_not_matter(self):
        block, x = packed(weight()), rows(3, K)
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        expected = OPS.linear(x, block, *arguments(SPECS[1]))
        for dtype in torch.bfloat16, torch.float64:
            torch.set_default_dtype(dtype)
            codes, scales = OPS.quantize(x, GROUP, 1, 1)
            self.assertEqual(scales.dtype, torch.float32)
            y = OPS.linear_quantized(codes, scales, block, N, GROUP, 1, 1, x.dtype)
            self.assertTrue(torch.equal(y, expected))
            self.assertTrue(torch.equal(OPS.linear(x, block, *arguments(SPECS[1])), expected))

    def test_shapes(self):
        block = packed(weight())
        x = rows(2, 3, K)
        y = OPS.linear(x, block, *arguments(SPECS[1]))
        self.assertEqual(y.shape, (2, 3, N))
        self.assertTrue(torch.equal(OPS.linear(x[1, 2], block, *arguments(SPECS[1])), y[1, 2]))
        self.assertEqual(OPS.linear(x[:0], block, *arguments(SPECS[1])).shape, (0, 3, N))
        spread = torch.zeros(6, 2 * K)
        spread[:, :K] = x.view(6, K)
        self.assertTrue(torch.equal(OPS.linear(spread[:, :K], block, *arguments(SPECS[1])),
                                    y.view(6, N)))

    def test_a_packed_tensor_may_be_copied(self):
        block, x = packed(weight(bias=True)), rows(3, K)
        expected = OPS.linear(x, block, *arguments(SPECS[1]))
        for again in block.clone(), copy.deepcopy(block), torch.cat([block, block])[:len(block)]:
            self.assertTrue(torch.equal(OPS.linear(x, again, *arguments(SPECS[1])), expected))

    def test_shards_of_rows_add_up(self):
        parts = weight(k=384, group=128)
        dense = dequantize(parts["qweight"], parts["qzeros"], parts["scales"], 128)
        x = rows(4, 384)
        for first in 192, 96, 352:
            total = 0
            for k0, k1 in (0, first), (first, 384):
                groups = slice(k0 // 128, -(-k1 // 128))
                block = pack_awq(parts["qweight"][k0:k1], parts["qzeros"][groups],
                                 parts["scales"][groups], 128, k_offset=k0)
                size = shard_group_size(128, k0, k1 - k0)
                y = OPS.linear(x[:, k0:k1].contiguous(), block, N, size, 0, 1)
                self.assertLess((y - x[:, k0:k1].double() @ dense[k0:k1]).abs().max().item(), 1e-5)
                total = total + y
            self.assertLess((total - x.double() @ dense).abs().max().item(), 2e-5)

    def test_opcheck(self):
        check_operators(self, "cpu")

    def test_compiled_equals_eager(self):
        check_compiled(self, "cpu")

    def test_overhead(self):
        """What a call costs besides its product: the smallest product there is."""
        block, x = packed(weight(64, 8, 64), 64), rows(1, 64)
        linear = OPS.linear.default
        times = []
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(200):
                linear(x, block, 8, 64, 1, 1)
            times.append((time.perf_counter() - start) / 200)
        print(f"torch.ops.nibble.linear, M=1 N=8 K=64: {min(times) * 1e6:.1f} us a call")
        self.assertLess(min(times), 50e-6)  # the bar is 10; this machine may be busy


def check_operators(test, device):
    block, x = packed(weight(bias=True), device=device), rows(2, 3, K, device=device)
    if device != "cpu":
        x = x.half()
    specs = SPECS[:4] + SPECS[6:7]
    for spec in specs:
        torch.library.opcheck(OPS.linear.default, (x, block, *arguments(spec, device=device)))
    n, group, mode, granularity, *rest = arguments(SPECS[3], device=device)
    torch.library.opcheck(OPS.quantize.default, (x, group, mode, granularity, *rest))
    codes, scales = OPS.quantize(x, group, mode, granularity, *rest)
    torch.library.opcheck(OPS.linear_quantized.default,
                          (codes, scales, block, n, group, mode, granularity, x.dtype))


def check_compiled(test, device):
    torch._dynamo.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    parts = weight(bias=True)
    first = AwqLinear.from_tensors(parts["qweight"].to(device), parts["qzeros"].to(device),
                                   parts["scales"].to(device), GROUP, parts["bias"].to(device))
    model = torch.nn.Sequential(first, torch.nn.SiLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in 1, 2, 7, 33:
            x = rows(m, K, device=device, dtype=dtype)
            y = compiled(x)
            # SiLU is the compiler's own; the product is not
            torch.testing.assert_close(y, model(x), rtol=2e-2, atol=2e-2)
            only = torch.compile(first, fullgraph=True, dynamic=True)(x)
            test.assertTrue(torch.equal(only, first(x)))


class Layer(unittest.TestCase):
    def make(self, **options):
        parts = weight(bias=True)
        layer = AwqLinear(K, N, bias=True, group_size=GROUP, bias_dtype=torch.float32, **options)
        layer.load_state_dict({name: part for name, part in parts.items()})
        return layer, parts

    def test_it_is_loaded_then_packed(self):
        layer, parts = self.make(mode="w4a16")
        with self.assertRaisesRegex(nibble.InvalidArgument, "pack"):
            layer(rows(2, K))
        layer.pack()
        layer.pack()
        self.assertEqual(list(layer.state_dict()), ["packed"])
        dense = dequantize(parts["qweight"], parts["qzeros"], parts["scales"], GROUP)
        y = layer(rows(2, 3, K))
        torch.testing.assert_close(y.double(), rows(2, 3, K).double() @ dense + parts["bias"],
                                   rtol=1e-5, atol=1e-5)

    def test_a_change_of_dtype_changes_nothing_but_x(self):
        layer, _ = self.make(mode=SPECS[6])
        layer.pack()
        x = rows(3, K, dtype=torch.float16)
        expected = layer(x)
        self.assertTrue(torch.equal(layer.half()(x), expected))
        self.assertTrue(torch.equal(copy.deepcopy(layer).bfloat16()(x), expected))
        self.assertEqual(layer.static_scales.dtype, torch.float32)

    def test_the_mode_can_be_changed(self):
        layer, _ = self.make()
        layer.pack()
        x = rows(3, K)
        for spec in SPECS:
            layer.set_mode(spec)
            self.assertTrue(torch.equal(layer(x), OPS.linear(x, layer.packed, *arguments(spec))))
        self.assertIn("w4a4 group-asym (2 of 4 groups int8)", repr(layer))

    def test_any_strides(self):
        layer, _ = self.make()
        layer.pack()
        x = rows(K, 5)
        self.assertTrue(torch.equal(layer(x.T), layer(x.T.contiguous())))

    def test_wrong_sizes_are_named(self):
        for pattern, make in {
                "out_features": lambda: AwqLinear(K, 71),
                "group_size": lambda: AwqLinear(K, N, group_size=100),
                "wide_groups": lambda: AwqLinear(K, N, group_size=GROUP, mode="w4a4",
                                                 wide_groups=[1, 0]),
                "static_scales": lambda: AwqLinear(K, N, mode="w4a8", static_scales=[1.0])}.items():
            with self.subTest(pattern), self.assertRaisesRegex(nibble.InvalidArgument, pattern):
                make()
        layer, _ = self.make()
        layer.pack()
        with self.assertRaisesRegex(nibble.InvalidArgument, "x: expected"):
            layer(rows(2, K - 8))


class Malformed(unittest.TestCase):
    def test_random_calls_never_crash(self):
        check_malformed(self, "cpu", MALFORMED_CALLS)


def check_malformed(test, device, calls):
    choose = random.Random(20261123)
    parts = weight(bias=True)
    block = packed(parts, device=device)
    refused = 0
    for _ in range(calls):
        call, words = malformed(choose, parts, block, device)
        try:
            call()
        except (nibble.NibbleError, TypeError, RuntimeError, NotImplementedError) as error:
            refused += 1
            test.assertRegex(str(error), words)
    test.assertGreater(refused, calls * 7 // 10)


def worse(choose, tensor):
    """`tensor`, spoilt in one of many ways."""
    other = "meta" if not GPU else "cuda" if tensor.device.type == "cpu" else "cpu"
    return choose.choice([
        lambda: tensor.to(choose.choice([torch.float64, torch.int16, torch.complex64])),
        lambda: tensor.mT.contiguous().mT if tensor.dim() == 2 and min(tensor.shape) > 1
        else tensor[::2],
        lambda: tensor[..., :choose.randrange(tensor.shape[-1])],
        lambda: tensor[..., 1:],
        lambda: torch.cat([tensor, tensor], -1)[..., ::2],
        lambda: tensor[None, None],
        lambda: tensor.reshape(-1)[0],
        lambda: tensor[:0],
        lambda: None,
        lambda: "text",
        lambda: tensor.to(other) if other == "meta" or tensor.dim() == 2 else tensor.double(),
        lambda: tensor[:1].expand(3, *tensor.shape[1:]),
    ])()


def malformed(choose, parts, block, device):
    """A random call that is wrong, or may be, and what its message must name."""
    x = rows(choose.randrange(4), K, device=device)
    x = x.half() if device != "cpu" else x
    mode, granularity = choose.choice([(0, 1), (1, 1), (1, 2), (2, 2)])
    good = [x, block, N, GROUP, mode, granularity, True, 1.0, None, None]
    kind = choose.randrange(5)
    # of the dispatcher, where an argument is no tensor or not where the others are
    torchs = "|nibble::|[Tt]ensor|schema|Meta|meta"
    if kind == 0:
        good[0] = worse(choose, rows(3, K, device=device, dtype=x.dtype))
        return lambda: OPS.linear(*good), "x|K|rows" + torchs
    if kind == 1:
        bad = block.clone()
        for _ in range(choose.randrange(1, 4)):
            bad[choose.randrange(48)] ^= choose.randrange(1, 256)
        if device != "cpu":  # nothing in device memory describes it: only its size does
            bad = block[:choose.randrange(len(block))]
        good[1] = choose.choice([bad, block[:choose.randrange(len(block))],
                                 block[choose.randrange(1, 500):], worse(choose, block)])
        return lambda: OPS.linear(*good), "packed" + torchs
    if kind == 2:
        no_fp8 = [(4, [3], "w4a8-fp8")] if device == "cpu" else []
        index, values, words = choose.choice(no_fp8 + [
            (2, [0, -8, 64, 80, 2 ** 40], "n|N|packed"),
            (3, [0, -2, 32, 100, 2 ** 40], "group"),
            (4, [-1, 5, 100], "mode"),
            (5, [-1, 5, 100], "granularity"),
            (5, [3, 4], "static"),
            (7, [-1.0, 1.5, float("nan"), float("inf")], "clip"),
            (6, [False], "asymmetric|symmetric"),
            (8, [torch.ones(3), torch.ones(2, 2)], "static_scales"),
            (9, [torch.ones(3, dtype=torch.uint8)], "wide_groups")])
        good[index] = choose.choice(values)
        if isinstance(good[index], torch.Tensor):
            good[index] = good[index].to(device)
        if index in (6, 7):
            good[4] = 1
        return lambda: OPS.linear(*good), words
    if kind == 3:
        names = ["qweight", "qzeros", "scales", "bias"]
        given = [parts["qweight"], parts["qzeros"], parts["scales"], parts["bias"]]
        index = choose.randrange(4)
        given[index] = worse(choose, given[index])
        if isinstance(given[index], torch.Tensor) and given[index].device.type == "meta":
            given[index] = None if index == 0 else given[index].to(torch.float64)
        words = names[index] + ("|group_size|qzeros|scales|bias|k_offset" if index == 0 else "")
        return lambda: pack_awq(*given[:3], GROUP, given[3]), words + torchs
    codes, scales = torch.zeros(3, K, dtype=torch.int8), torch.ones(3)
    which = choose.randrange(2)
    bad = [codes, scales]
    bad[which] = worse(choose, bad[which])
    moved = [each.to(device) if isinstance(each, torch.Tensor) and each.device.type == "cpu"
             else each for each in bad]
    return lambda: OPS.linear_quantized(*moved, block, N, GROUP, 1, 1, x.dtype), \
        "codes|scales|group_size|packed" + torchs


@needs_gpu
class Gpu(unittest.TestCase):
    CASES = [(256, 72, 64), (512, 256, 128), (1536, 576, 64), (4096, 4096, 128)]

    def test_linear_is_that_of_the_cpu(self):
        for k, n, group in self.CASES:
            parts = weight(k, n, group, bias=True)
            here, there = packed(parts, group), packed(parts, group, "cuda")
            for m in 1, 3, 16, 17, 100, 600:
                for dtype in torch.float16, torch.bfloat16:
                    x = rows(m, k, dtype=dtype)
                    for spec in nibble.make_spec("w4a16"), *SPECS[1:6]:
                        given = arguments(spec, n, group)
                        try:
                            y = OPS.linear(x.cuda(), there, *given)
                        except nibble.Unsupported as error:
                            self.assertRegex(str(error), "it takes|kernel")
                            continue
                        expected = OPS.linear(x, here, *given)
                        gap = (y.cpu().double() - expected.double()).norm() \
                            / expected.double().norm()
                        self.assertLess(gap.item(), 2e-3, f"{k} {n} {m} {dtype} {spec}")

    def test_w4a8_fp8_is_the_product_of_e4m3_activations(self):
        for k, n, group in self.CASES[1:]:
            parts = weight(k, n, group, bias=True)
            here, there = packed(parts, group), packed(parts, group, "cuda")
            for m in 1, 16, 100, 600:
                x = rows(m, k, dtype=torch.bfloat16)
                for granularity in "token", "tensor":
                    spec = nibble.make_spec("w4a8-fp8", granularity)
                    y = OPS.linear(x.cuda(), there, *arguments(spec, n, group))
                    largest = x.float().abs().amax(dim=1, keepdim=True)
                    scale = (largest if granularity == "token" else largest.max()) / 448
                    near = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
                    exact = OPS.linear(near, here, *arguments(nibble.make_spec("w4a16"), n, group))
                    gap = (y.cpu().double() - exact.double()).norm() / exact.double().norm()
                    self.assertLess(gap.item(), 4e-3, f"{k} {n} {m} {spec}")

    def test_the_halves_make_the_whole(self):
        block, x = packed(weight(512, 256, 128), 128, "cuda"), rows(40, 512, dtype=torch.float16)
        for spec in SPECS[1:6]:
            given = arguments(spec, 256, 128)
            codes, scales = OPS.quantize(x.cuda(), 128, *given[2:])
            cpu_codes, cpu_scales = OPS.quantize(x, 128, *given[2:])
            self.assertTrue(torch.equal(codes.cpu(), cpu_codes), str(spec))
            self.assertTrue(torch.equal(scales.cpu().view(-1)[:1], cpu_scales.view(-1)[:1]))
            y = OPS.linear_quantized(codes, scales, block, 256, 128, *given[2:4], x.dtype)
            expected = OPS.linear(x.cuda(), block, *given)
            torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)

    def test_opcheck(self):
        check_operators(self, "cuda")

    def test_compiled_equals_eager(self):
        check_compiled(self, "cuda")

    def test_graphs_equal_eager(self):
        parts = weight(4096, 4096, 128)
        layers = [AwqLinear.from_tensors(*(parts[name].cuda() for name in
                                           ("qweight", "qzeros", "scales")), 128, mode=mode)
                  for mode in ("w4a8", "w4a16")]
        graphs = []
        for m in 1, 4, 64, 256, 2048:
            x = rows(m, 4096, dtype=torch.bfloat16, device="cuda")

            def work():
                y = layers[0](x)
                return layers[1](y) + layers[0](y)

            eager = work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = work()
            graphs.append((graph, x, y, eager))
        for _ in range(3):  # in any order, with other work between
            for graph, x, y, eager in reversed(graphs):
                y.fill_(float("nan"))
                graph.replay()
                self.assertTrue(torch.equal(y, eager))
                layers[0](x)

    def test_streams_have_workspaces_of_their_own(self):
        layer = AwqLinear.from_tensors(*(weight(4096, 4096, 128)[name].cuda() for name in
                                         ("qweight", "qzeros", "scales")), 128)
        inputs = [rows(100, 4096, dtype=torch.float16, seed=s, device="cuda") for s in range(4)]
        expected = [layer(x) for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in inputs]
        for _ in range(20):
            results = []
            for x, stream in zip(inputs, streams):
                with torch.cuda.stream(stream):
                    results.append(layer(x))
            torch.cuda.synchronize()
            for y, wanted in zip(results, expected):
                self.assertTrue(torch.equal(y, wanted))

    def test_random_calls_never_crash(self):
        check_malformed(self, "cuda", MALFORMED_CALLS // 5)
        torch.cuda.synchronize()


if __name__ == "__main__":
    unittest.main(verbosity=2)
