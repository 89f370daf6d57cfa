"""One rank of test_vllm_layers.py: builds linear layers in vLLM without an engine, loads them as a
checkpoint's loader would, and writes what they compute, or why they were refused.

    vllm_layer_worker.py DIRECTORY RANK RANKS
"""

import sys
from pathlib import Path

import vllm_testing

vllm_testing.set_environment(VLLM_DIST_IDENT="layers")

import torch  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import (init_distributed_environment,  # noqa: E402
                              initialize_model_parallel)
from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402


def build(case, config, dtype):
    """The layer, and the shard ids under which its parts are loaded."""
    common = {"bias": case["bias"], "quant_config": config, "params_dtype": dtype,
              "prefix": f"model.layers.0.{case['name']}", "return_bias": False}
    k, sizes = case["k"], case["sizes"]
    if case["kind"] == "qkv":
        return linear.QKVParallelLinear(k, 64, sizes[0] // 64, sizes[1] // 64, **common), "qkv"
    if case["kind"] == "merged":
        return linear.MergedColumnParallelLinear(k, sizes, **common), range(len(sizes))
    if case["kind"] == "column":
        return linear.ColumnParallelLinear(k, sizes[0], **common), None
    if case["kind"] == "replicated":
        return linear.ReplicatedLinear(k, sizes[0], **common), None
    layer = linear.RowParallelLinear(k, sizes[0], **common)
    layer.reduce_results = False  # each rank's part of the sum is looked at
    return layer, None


def load(layer, case, ids):
    parts = case["parts"]
    for name, parameter in dict(layer.named_parameters()).items():
        for part, shard in zip(parts, ids or [None] * len(parts), strict=True):
            arguments = () if shard is None else (shard,)
            parameter.weight_loader(parameter, part[name], *arguments)


def run(case, rank, ranks):
    config = get_quantization_config("nibble").from_config(case["config"])
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"],
                                     "gate_up_proj": ["gate_proj", "up_proj"]}
    config.scale_dtype = case["parts"][0]["scales"].dtype
    x = case["x"]
    layer, ids = build(case, config, x.dtype)
    method = type(layer.quant_method).__name__
    if method != "NibbleLinearMethod":
        return {"method": method}
    load(layer, case, ids)
    layer.quant_method.process_weights_after_loading(layer)
    if case["kind"] == "row":
        x = x.chunk(ranks, dim=1)[rank].contiguous()
    return {"method": method, "y": layer(x)}


def main():
    directory, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    load_general_plugins()
    results = []
    for case in torch.load(directory / "cases.pt"):
        config = VllmConfig(additional_config={"nibble": case["options"]})
        with set_current_vllm_config(config):
            if not results:
                init_distributed_environment(ranks, rank, f"file://{directory}/rendezvous-{ranks}",
                                             rank, "gloo")
                initialize_model_parallel(ranks)
            try:
                results.append(run(case, rank, ranks))
            except (ValueError, RuntimeError) as error:
                results.append({"error": f"{type(error).__name__}: {error}"})
    torch.save(results, directory / f"results-{ranks}-{rank}.pt")


if __name__ == "__main__":
    main()
