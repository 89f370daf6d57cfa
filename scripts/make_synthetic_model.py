#!/usr/bin/env python3
"""Makes an AWQ checkpoint of a real model's shapes with random weights, to measure speed, memory
and loading: what it generates means nothing. Needs numpy only.

  scripts/make_synthetic_model.py llama-3.1-8b build/models/llama-8b-random     # 4.7 GB, tied head
"""

import argparse
import json
import pathlib
import shutil
import struct
import sys

import numpy as np

SHAPES = {
    # hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 128, 151936),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 64, 32000),
    "tiny": (256, 512, 2, 4, 2, 64, 512),
}
GROUP_SIZE = 128
SHARD_BYTES = 2 << 30


def config_of(shape):
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocab = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "eos_token_id": vocab - 1,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "version": "gemm",
            "zero_point": True,
        },
    }


class Tensors:
    """(name, dtype of the file, shape, function that makes the bytes), in file order."""

    def __init__(self, shape, seed):
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocab = SHAPES[shape]
        self.random = np.random.default_rng(seed)
        self.entries = []
        self.dense("model.embed_tokens.weight", (vocab, hidden), 0.02)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            self.ones(prefix + "input_layernorm.weight", hidden)
            self.ones(prefix + "post_attention_layernorm.weight", hidden)
            for name, k, n in (
                ("self_attn.q_proj", hidden, heads * head_dim),
                ("self_attn.k_proj", hidden, kv_heads * head_dim),
                ("self_attn.v_proj", hidden, kv_heads * head_dim),
                ("self_attn.o_proj", heads * head_dim, hidden),
                ("mlp.gate_proj", hidden, intermediate),
                ("mlp.up_proj", hidden, intermediate),
                ("mlp.down_proj", intermediate, hidden),
            ):
                self.quantized(prefix + name, k, n)
        self.ones("model.norm.weight", hidden)

    def add(self, name, dtype, shape, make):
        self.entries.append((name, dtype, shape, make))

    def dense(self, name, shape, spread):
        def make():
            values = self.random.standard_normal(shape, dtype=np.float32)
            return (values * np.float32(spread)).astype(np.float16)

        self.add(name, "F16", shape, make)

    def ones(self, name, size):
        self.add(name, "F16", (size,), lambda: np.ones(size, np.float16))

    def quantized(self, name, k, n):
        def words(rows):
            return lambda: self.random.integers(
                0, 1 << 32, (rows, n // 8), dtype=np.uint32
            )

        # q - z has a spread of 6.5: the weight's is near 1 / sqrt(k), which keeps activations tame
        scale = 1 / (6.5 * np.sqrt(k))
        groups = k // GROUP_SIZE
        self.add(name + ".qweight", "I32", (k, n // 8), words(k))
        self.add(name + ".qzeros", "I32", (groups, n // 8), words(groups))
        self.add(
            name + ".scales",
            "F16",
            (groups, n),
            lambda: (self.random.uniform(0.5, 1.5, (groups, n)) * scale).astype(np.float16),
        )


def size_of(entry):
    _, dtype, shape, _ = entry
    return int(np.prod(shape)) * {"F16": 2, "I32": 4}[dtype]


def write_shard(path, entries):
    header, offset = {}, 0
    for entry in entries:
        name, dtype, shape, _ = entry
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size_of(entry)],
        }
        offset += size_of(entry)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in entries:
            entry[3]().tofile(file)
    return offset


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--tokenizer", type=pathlib.Path, metavar="DIR",
                        help="copy tokenizer.json from DIR, so that `nibble generate` runs")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"{args.out} exists and is not empty")
    args.out.mkdir(parents=True, exist_ok=True)
    shards = [[]]
    for entry in Tensors(args.shape, args.seed).entries:
        if sum(map(size_of, shards[-1])) + size_of(entry) > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append(entry)
    weight_map, total = {}, 0
    for index, entries in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        total += write_shard(args.out / name, entries)
        weight_map.update({entry[0]: name for entry in entries})
        print(f"{args.out / name}: {sum(map(size_of, entries)) / 1e9:.2f} GB", file=sys.stderr)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    (args.out / "config.json").write_text(json.dumps(config_of(args.shape), indent=2) + "\n")
    if args.tokenizer:
        shutil.copyfile(args.tokenizer / "tokenizer.json", args.out / "tokenizer.json")
    print(f"{args.out}: {total / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
