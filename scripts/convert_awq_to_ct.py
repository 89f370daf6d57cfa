#!/usr/bin/env python3
"""Convert an AutoAWQ directory to compressed-tensors, by compressed-tensors' own converter.

The result is an independent oracle: the same codes, zero points and scales in another layout,
written by other people's code. `nibble inspect --json --digest` must print the same digests for
both directories; --compare checks that.

With --sample the AutoAWQ directory is first made here: a tiny Llama of random codes, packed with
numpy from the format's definition, so that no code of ours is on that side either.

Needs the packages of python/requirements-torch.txt.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 128, 256, 4, 2, 32, 2, 64
GROUP = 32
# Bits 4i..4i+3 of a word hold column PACK_ORDER[i] of its eight columns.
PACK_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(np, values):
    """uint8 [R, C] with values 0..15 -> int32 [R, C/8] in AutoAWQ's nibble order."""
    columns = values.reshape(values.shape[0], -1, 8)[:, :, PACK_ORDER].astype(np.uint32)
    return (columns << (4 * np.arange(8, dtype=np.uint32))).sum(2, dtype=np.uint32).view(np.int32)


def make_sample(directory):
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(20240607)

    def dense(*shape):
        return (rng.standard_normal(shape) * 0.05).astype(np.float16)

    tensors = {"model.embed_tokens.weight": dense(VOCAB, HIDDEN),
               "lm_head.weight": dense(VOCAB, HIDDEN),
               "model.norm.weight": np.ones(HIDDEN, np.float16)}
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    linears = {"self_attn.q_proj": (HIDDEN, q), "self_attn.k_proj": (HIDDEN, kv),
               "self_attn.v_proj": (HIDDEN, kv), "self_attn.o_proj": (q, HIDDEN),
               "mlp.gate_proj": (HIDDEN, FFN), "mlp.up_proj": (HIDDEN, FFN),
               "mlp.down_proj": (FFN, HIDDEN)}
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = np.ones(HIDDEN, np.float16)
        for name, (k, n) in linears.items():
            codes = rng.integers(0, 16, (k, n), dtype=np.uint8)
            zeros = rng.integers(0, 16, (k // GROUP, n), dtype=np.uint8)
            scales = rng.uniform(0.001, 0.02, (k // GROUP, n))
            scales[0, ::7] *= -1  # negative scales are legal
            tensors[f"{prefix}{name}.qweight"] = pack(np, codes)
            tensors[f"{prefix}{name}.qzeros"] = pack(np, zeros)
            tensors[f"{prefix}{name}.scales"] = scales.astype(np.float16)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
              "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": FFN,
              "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
              "head_dim": HEAD_DIM, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
              "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "tie_word_embeddings": False, "torch_dtype": "float16",
              "bos_token_id": 1, "eos_token_id": 2,
              "quantization_config": {"quant_method": "awq", "version": "gemm", "bits": 4,
                                      "group_size": GROUP, "zero_point": True,
                                      "modules_to_not_convert": None}}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def quant_method(directory):
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("quantization_config", {}).get("quant_method")


def convert(awq_dir, ct_dir):
    from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint

    if ct_dir.exists():
        if quant_method(ct_dir) != "compressed-tensors":
            sys.exit(f"convert_awq_to_ct: error: {ct_dir} exists and is no earlier conversion")
        shutil.rmtree(ct_dir)
    convert_checkpoint(model_stub=str(awq_dir), save_directory=str(ct_dir),
                       converter=AutoAWQConverter.from_pretrained(str(awq_dir)), device="cpu")


def digests(nibble, directory):
    command = [nibble, "inspect", str(directory), "--json", "--digest"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if result.returncode != 0:
        sys.exit(f"convert_awq_to_ct: error: {' '.join(command)} exited {result.returncode}")
    layers = json.loads(result.stdout)["layers"]
    return {layer["name"]: layer["digest"] for layer in layers if layer.get("digest")}


def compare(nibble, awq_dir, ct_dir):
    """Number of layers whose digests differ or that only one directory has."""
    awq, ct = digests(nibble, awq_dir), digests(nibble, ct_dir)
    if not awq:
        sys.exit(f"convert_awq_to_ct: error: no quantized layer in {awq_dir}")
    wrong = [name for name in sorted(set(awq) | set(ct)) if awq.get(name) != ct.get(name)]
    for name in wrong:
        print(f"differs: {name}: awq {awq.get(name)}, compressed-tensors {ct.get(name)}")
    print(f"{len(awq)} layers compared, {len(wrong)} differ")
    return len(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("awq_dir", type=Path, metavar="AWQ_DIR")
    parser.add_argument("ct_dir", type=Path, metavar="CT_DIR",
                        help="written anew; an earlier conversion there is replaced")
    parser.add_argument("--sample", action="store_true",
                        help="first write a small random checkpoint to AWQ_DIR")
    parser.add_argument("--compare", metavar="NIBBLE",
                        help="path of the nibble tool: compare both directories' digests")
    args = parser.parse_args()
    if args.sample:
        make_sample(args.awq_dir)
    if quant_method(args.awq_dir) != "awq":
        sys.exit(f"convert_awq_to_ct: error: {args.awq_dir} is no AutoAWQ directory")
    convert(args.awq_dir, args.ct_dir)
    return 1 if args.compare and compare(args.compare, args.awq_dir, args.ct_dir) else 0


if __name__ == "__main__":
    sys.exit(main())
