"""Linear layers of vLLM with the plugin, without an engine, on one rank and on two: every element
against the C ABI bit for bit, the sum of the ranks against float64.

    build/venv-vllm/bin/python tests/python/test_vllm_layers.py
"""

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch

import awq_models
import c_abi
from nibble.plan import choose_plan
from vllm_testing import ENVIRONMENT

TOKENS = 5
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def quantization(group_size, **changes):
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm",
            "zero_point": True, "modules_to_not_convert": None} | changes


def case(name, kind, k, sizes, group_size, *, mode="w4a8", bias=False, dtype=BF16,
         scale_dtype=F16, **changes):
    generator = torch.Generator().manual_seed(len(name) + k)
    parts = []
    for n in sizes:
        part = awq_models.random_linear(k, n, group_size if group_size != -1 else k, generator,
                                        scale_dtype)
        if bias:
            part["bias"] = torch.randn(n, generator=generator).to(dtype)
        parts.append(part)
    x = torch.randn((TOKENS, k), generator=generator).to(dtype)
    return {"name": name, "kind": kind, "k": k, "sizes": sizes, "bias": bias, "parts": parts,
            "x": x, "group": group_size, "options": {"mode": mode},
            "config": quantization(group_size, **changes)}


def cases():
    """Those that run, then those that are refused (with what the message must hold)."""
    good = [
        case("self_attn.qkv_proj", "qkv", 256, [256, 128, 128], 128),
        case("self_attn.qkv_proj", "qkv", 256, [256, 128, 128], 128, bias=True, dtype=F16),
        case("self_attn.qkv_proj", "qkv", 256, [256, 128, 128], 64, scale_dtype=BF16),
        case("mlp.gate_up_proj", "merged", 256, [384, 384], 128, mode="w4a4"),
        case("mlp.up_proj", "column", 256, [384], -1, mode="w4a16"),
        case("other.proj", "replicated", 256, [128], 128, bias=True),
        case("self_attn.o_proj", "row", 512, [256], 128),
        case("self_attn.o_proj", "row", 512, [256], 128, bias=True, mode="w4a16", dtype=F32),
        case("mlp.down_proj", "row", 512, [256], -1, mode="w4a16", dtype=F32),
        # Two ranks cut these inside a group.
        case("mlp.down_proj", "row", 384, [256], 128),
        case("mlp.down_proj", "row", 384, [256], 128, mode="w4a16", dtype=F32),
        case("mlp.down_proj", "row", 448, [256], 64, mode="w4a4", dtype=F16),
        case("mlp.down_proj", "row", 384, [256], 128, mode="w4a16", dtype=BF16),
    ]
    plan = {"schema_version": 1, "layers": [
        {"qkv": {"mode": "w4a16"}, "gate_up": {"mode": "w4a16"}, "o": {"mode": "w4a16"},
         "down": {"mode": "w4a8", "granularity": "static-group",
                  "static_scales": [0.03, 0.02, 0.025]}}]}
    planned = case("mlp.down_proj", "row", 384, [256], 128, nibble=plan)
    planned["options"] = {}
    good.append(planned)
    wide = {"mode": "w4a4", "granularity": "group", "symmetric": False, "clip": 0.95,
            "wide_groups": {"of": 3, "groups": [1]}}
    mixed = case("mlp.down_proj", "row", 384, [256], 128,
                 nibble={"schema_version": 1, "layers": [plan["layers"][0] | {"down": wide}]})
    mixed["options"] = {"mode": "auto"}
    good.append(mixed)
    refused = [
        (case("mlp.down_proj", "row", 96, [64], 32), {2: "group"}),
        (case("mlp.gate_up_proj", "merged", 128, [24, 24], 128), {2: "expected a multiple of 8"}),
        (case("mlp.down_proj", "row", 160, [64], 128), {1: "group size 128", 2: "group size 128"}),
        (case("mlp.up_proj", "column", 256, [64], 128, mode="w8a8"), {1: "'w8a8'", 2: "'w8a8'"}),
    ]
    wrong_type = case("mlp.up_proj", "column", 256, [64], 128)
    wrong_type["parts"][0]["qzeros"] = wrong_type["parts"][0]["qzeros"].to(torch.int64)
    refused.append((wrong_type, {1: "expected torch.int32, found torch.int64",
                                 2: "expected torch.int32, found torch.int64"}))
    skipped = case("self_attn.o_proj", "row", 256, [64], 128, modules_to_not_convert=["o_proj"])
    return good, refused, skipped


def shard_weight(parts, columns, rows, group_size):
    """The weight that a rank holds as one AWQ weight of its own: rows of K, columns of each part;
    groups are cut where the rank's rows begin."""
    k = rows.stop - rows.start
    group = math.gcd(group_size, rows.start, k)
    index = torch.arange(rows.start, rows.stop, group) // group_size
    taken = []
    for part, cut in zip(parts, columns, strict=True):
        codes = awq_models.unpack_columns(part["qweight"])[rows, cut]
        zeros = awq_models.unpack_columns(part["qzeros"])[index, cut]
        taken.append((codes, zeros, part["scales"][index, cut]))
    codes, zeros, scales = (torch.cat(tensors, dim=1) for tensors in zip(*taken, strict=True))
    return awq_models.pack_columns(codes), awq_models.pack_columns(zeros), scales, group


def shard_of(case, rank, ranks):
    """columns of each part, and rows, of a rank."""
    whole = [slice(0, n) for n in case["sizes"]]
    if case["kind"] == "row":
        size = case["k"] // ranks
        return whole, slice(rank * size, (rank + 1) * size)
    if case["kind"] == "replicated":
        return whole, slice(0, case["k"])
    return ([slice(rank * n // ranks, (rank + 1) * n // ranks) for n in case["sizes"]],
            slice(0, case["k"]))


def spec_of(case):
    plan = choose_plan(case["options"].get("mode"), None, case["config"])
    return plan.spec(f"model.layers.0.{case['name']}")


def cut_spec(spec, rows, group, size):
    """The spec of the rows of a rank."""
    taken = [row // group for row in range(rows.start, rows.stop, size)]
    scales, wide = spec.static_scales, spec.wide_groups
    if len(scales) > 1:
        scales = tuple(scales[i] for i in taken)
    return dataclasses.replace(spec, static_scales=scales,
                               wide_groups=tuple(wide[i] for i in taken) if wide else ())


def exact_product(case):
    """float64, from the dequantized weight, with the bias."""
    group = case["group"] if case["group"] != -1 else case["k"]
    weight = torch.cat([awq_models.dequantize(part["qweight"], part["qzeros"], part["scales"],
                                              group) for part in case["parts"]], dim=1)
    y = case["x"].double() @ weight
    return y + torch.cat([part["bias"].double() for part in case["parts"]]) if case["bias"] else y


def relative_error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


class Layers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.good, cls.refused, skipped = cases()
        every = cls.good + [entry[0] for entry in cls.refused] + [skipped]
        with tempfile.TemporaryDirectory() as directory:
            torch.save(every, Path(directory) / "cases.pt")
            worker = Path(__file__).with_name("vllm_layer_worker.py")
            jobs = {}
            for ranks in (1, 2):
                for rank in range(ranks):
                    command = [sys.executable, str(worker), directory, str(rank), str(ranks)]
                    jobs[ranks, rank] = subprocess.Popen(
                        command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, text=True)
            cls.results = {}
            for (ranks, rank), job in jobs.items():
                output, _ = job.communicate(timeout=300)
                if job.returncode != 0:
                    raise AssertionError(f"rank {rank} of {ranks}:\n{output[-6000:]}")
                cls.results[ranks, rank] = torch.load(
                    Path(directory) / f"results-{ranks}-{rank}.pt")

    def outputs(self, index, ranks):
        found = [self.results[ranks, rank][index] for rank in range(ranks)]
        for result in found:
            self.assertEqual("NibbleLinearMethod", result.get("method"), result)
        return [result["y"] for result in found]

    def test_every_bit_is_that_of_the_c_abi(self):
        products = 0
        for index, entry in enumerate(self.good):
            group = entry["group"] if entry["group"] != -1 else entry["k"]
            spec = spec_of(entry)
            for ranks in (1, 2):
                for rank, y in enumerate(self.outputs(index, ranks)):
                    columns, rows = shard_of(entry, rank, ranks)
                    *weight, size = shard_weight(entry["parts"], columns, rows, group)
                    bias = None
                    if entry["bias"] and (entry["kind"] != "row" or rank == 0):
                        bias = torch.cat([part["bias"][cut] for part, cut
                                          in zip(entry["parts"], columns, strict=True)])
                    expected = c_abi.product(entry["x"][:, rows], *weight, size, bias,
                                             cut_spec(spec, rows, group, size))
                    self.assertEqual(y.dtype, entry["x"].dtype)
                    self.assertTrue(torch.equal(y, expected),
                                    f"{entry['name']} K={entry['k']} {spec} rank {rank} of {ranks}")
                    products += 1
        print(f"{products} products equal the C ABI's bit for bit", file=sys.stderr)

    def test_relative_error_on_two_ranks_is_that_on_one(self):
        for index, entry in enumerate(self.good):
            if entry["kind"] != "row":
                continue
            expected, errors = exact_product(entry), {}
            for ranks in (1, 2):
                y = sum(part.double() for part in self.outputs(index, ranks))
                errors[ranks] = relative_error(y, expected)
            with self.subTest(name=entry["name"], k=entry["k"], options=entry["options"]):
                print(f"{entry['name']} K={entry['k']} {entry['options']} relative error: "
                      f"1 rank {errors[1]:.2g}, 2 ranks {errors[2]:.2g}", file=sys.stderr)
                self.assertLess(errors[2], 1.5 * errors[1] + 1e-6)
                self.assertLess(errors[1], {"w4a16": 4e-3, "w4a8": 0.02, "w4a4": 0.2}.get(
                    entry["options"].get("mode"), 0.1))

    def test_refused(self):
        for offset, (entry, messages) in enumerate(self.refused):
            for ranks, text in messages.items():
                for rank in range(ranks):
                    result = self.results[ranks, rank][len(self.good) + offset]
                    self.assertIn(text, result.get("error", "nothing was refused"), entry["name"])
                    self.assertIn(entry["name"] if "w8a8" not in text else "nibble",
                                  result["error"])

    def test_skipped(self):
        for result in self.results.values():
            self.assertEqual("UnquantizedLinearMethod", result[-1].get("method"), result[-1])


if __name__ == "__main__":
    unittest.main(verbosity=2)
