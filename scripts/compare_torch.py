#!/usr/bin/env python3
"""A transformers model of a few layers with Nibble's linears against the same in bf16, on this
machine's GPU or CPU, interleaved: milliseconds of one forward pass, by tokens.

    NIBBLE_LIBRARY=build/cuda/libnibble.so scripts/compare_torch.py --mode w4a8

Weights are random, of Llama-3.1-8B's shapes, the head left out. On a GPU both are captured into
CUDA graphs; what is timed is their replay.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaModel  # noqa: E402

from nibble.plan import choose_plan  # noqa: E402
from nibble.torch import AwqLinear  # noqa: E402

TOKENS = ((1, 1), (8, 1), (64, 1), (256, 1), (1, 512), (1, 2048))  # sequences, tokens of each


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", default="w4a8", help="w4a16, w4a8 or w4a4 (default w4a8)")
    parser.add_argument("--act", choices=("token", "group"), default="token")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


def random_linear(linear, group_size, spec, device):
    k, n = linear.in_features, linear.out_features
    qweight = torch.randint(-2**31, 2**31, (k, n // 8), dtype=torch.int32)
    qzeros = torch.full((k // group_size, n // 8), -0x77777778, dtype=torch.int32)
    scales = ((0.5 + torch.rand(k // group_size, n)) / (4.7 * k**0.5)).half()
    return AwqLinear.from_tensors(qweight.to(device), qzeros.to(device), scales.to(device),
                                  group_size, mode=spec)


def make_models(options, device):
    config = LlamaConfig(hidden_size=options.hidden, intermediate_size=options.intermediate,
                         num_hidden_layers=options.layers,
                         num_attention_heads=options.hidden // 128,
                         num_key_value_heads=max(1, options.hidden // 512), vocab_size=1024,
                         max_position_embeddings=4096)
    torch.manual_seed(1)
    with torch.device(device):
        dense = LlamaModel(config).to(torch.bfloat16).eval()
        ours = LlamaModel(config).to(torch.bfloat16).eval()
    plan = choose_plan(options.mode, options.act, {})
    for name, module in list(ours.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(ours.get_submodule(parent), child,
                    random_linear(module, options.group_size, plan.spec(name), device))
    return {"bf16": dense, "nibble": ours}


def runner(model, sequences, tokens, device):
    """A call that runs one forward pass."""
    ids = torch.randint(0, 1024, (sequences, tokens), device=device)
    for _ in range(3):
        model(ids, use_cache=False)
    if device == "cpu":
        return lambda: model(ids, use_cache=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(ids, use_cache=False)
    return graph.replay


def milliseconds(run, device, repeats):
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) * 1e3 / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


@torch.inference_mode()
def main():
    options = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    models = make_models(options, device)
    print(f"{name}, torch {torch.__version__}: {options.layers} layers, hidden {options.hidden}, "
          f"intermediate {options.intermediate}, g={options.group_size}, {options.mode} "
          f"{options.act}; ms a pass, median of {options.rounds}")
    print("sequences x tokens     bf16   nibble   speed-up")
    rows = []
    for sequences, tokens in TOKENS:
        runs = {kind: runner(model, sequences, tokens, device) for kind, model in models.items()}
        times = {kind: [] for kind in runs}
        repeats = 10 if device == "cuda" else 1
        for turn in range(options.rounds):
            for kind in list(runs)[::1 if turn % 2 else -1]:
                times[kind].append(milliseconds(runs[kind], device, repeats))
        median = {kind: statistics.median(each) for kind, each in times.items()}
        rows.append({"sequences": sequences, "tokens": tokens, **median})
        print(f"{sequences:9} x {tokens:<6} {median['bf16']:9.3f} {median['nibble']:8.3f} "
              f"{median['bf16'] / median['nibble']:9.2f}x", flush=True)
    if options.json:
        document = {"device": name, "torch": torch.__version__, **vars(options), "rows": rows}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
