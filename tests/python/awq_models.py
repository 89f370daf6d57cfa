"""AWQ checkpoints for tests of hosts (vLLM, transformers): tiny random models, and a real one made
divisible by two ranks. Needs torch and safetensors.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

END = 256  # the token after those of the 256 bytes
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column 8c + ORDER[i]


def pack_columns(values):
    """(rows, N) of 0..15 as AWQ packs them: (rows, N / 8) int32."""
    rows, n = values.shape
    grouped = values.to(torch.int64).reshape(rows, n // 8, 8)[:, :, list(ORDER)]
    words = (grouped << (4 * torch.arange(8))).sum(dim=2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_columns(words):
    """The inverse of pack_columns."""
    nibbles = (words.to(torch.int64)[:, :, None] >> (4 * torch.arange(8))) & 15
    values = torch.empty_like(nibbles)
    values[:, :, list(ORDER)] = nibbles
    return values.reshape(words.shape[0], -1)


def dequantize(qweight, qzeros, scales, group_size):
    """(K, N) float64 weights."""
    k = qweight.shape[0]
    group = torch.arange(k) // group_size
    codes = unpack_columns(qweight) - unpack_columns(qzeros)[group]
    return codes.double() * scales.double()[group]


def random_linear(k, n, group_size, generator, scale_dtype=torch.float16):
    """qweight, qzeros, scales of a weight with a spread near 1 / sqrt(K)."""
    groups = k // group_size
    codes = torch.randint(0, 16, (k, n), generator=generator)
    zeros = torch.randint(5, 11, (groups, n), generator=generator)
    scales = (0.5 + torch.rand((groups, n), generator=generator)) / (4.7 * k**0.5)
    return {"qweight": pack_columns(codes), "qzeros": pack_columns(zeros),
            "scales": scales.to(scale_dtype)}


def write_tokenizer(out):
    """Byte-level, one token per byte: enough for any text."""
    letters = sorted(set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256)))
    others = [byte for byte in range(256) if byte not in letters]
    alphabet = [chr(byte) for byte in letters] + [chr(256 + i) for i in range(len(others))]
    special = {"id": END, "content": "<end>", "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "merges": [],
                  "vocab": {letter: i for i, letter in enumerate(alphabet)}},
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>",
         "model_max_length": 2048,
         "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}))


def make_tiny(out, *, family="llama", hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2,
              vocabulary=320, group_size=128, scale_dtype=torch.float16, tied=False, skipped=(),
              zero_point=True, plan=None, seed=1):
    """A random llama or qwen2 (which has biases) of head_dim 64. `skipped`: leaf names of linears
    that stay in 16 bits; `plan`: the "nibble" block of its quantization_config."""
    out = Path(out)
    out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, spread=1.0):
        return (torch.randn(shape, generator=generator) * spread).half()

    tensors = {"model.embed_tokens.weight": normal(vocabulary, hidden),
               "model.norm.weight": 1 + normal(hidden, spread=0.1)}
    if not tied:
        tensors["lm_head.weight"] = normal(vocabulary, hidden, spread=0.3)
    kv = 64 * kv_heads
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = 1 + normal(hidden, spread=0.1)
        for name, k, n in (("self_attn.q_proj", hidden, 64 * heads),
                           ("self_attn.k_proj", hidden, kv), ("self_attn.v_proj", hidden, kv),
                           ("self_attn.o_proj", 64 * heads, hidden),
                           ("mlp.gate_proj", hidden, intermediate),
                           ("mlp.up_proj", hidden, intermediate),
                           ("mlp.down_proj", intermediate, hidden)):
            leaf = name.split(".")[-1]
            if leaf in skipped:
                tensors[f"{prefix}{name}.weight"] = normal(n, k, spread=k**-0.5)
            else:
                parts = random_linear(k, n, group_size if group_size != -1 else k, generator,
                                      scale_dtype)
                if not zero_point:
                    parts["qzeros"] = torch.full_like(parts["qzeros"], -0x77777778)
                tensors.update({f"{prefix}{name}.{key}": value for key, value in parts.items()})
            if family == "qwen2" and leaf in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{prefix}{name}.bias"] = normal(n, spread=0.5)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm",
                    "zero_point": zero_point, "modules_to_not_convert": list(skipped) or None}
    if plan is not None:
        quantization["nibble"] = plan
    config = {
        "architectures": ["Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"],
        "model_type": family, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": 64, "vocab_size": vocabulary, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": tied, "torch_dtype": "float16", "bos_token_id": None,
        "eos_token_id": END, "quantization_config": quantization,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    write_tokenizer(out)
    return out


def widen_for_two_ranks(source, out):
    """The same function as SmolLM2-135M (9 heads, 3 KV heads, intermediate 1536, group size 64)
    with zero weights beside the real ones, so that two ranks divide it and their cut of down_proj
    falls inside a group: 12 heads, 4 KV heads, intermediate 1600."""
    source, out = Path(source), Path(out)
    config = json.loads((source / "config.json").read_text())
    group_size = config["quantization_config"]["group_size"]
    head, kv_heads = config["head_dim"], config["num_key_value_heads"]
    ratio = config["num_attention_heads"] // kv_heads
    extra = {"q_proj": head * ratio, "k_proj": head, "v_proj": head, "o_proj": head * ratio,
             "gate_proj": group_size, "up_proj": group_size, "down_proj": group_size}
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        count = extra.get(module.split(".")[-1])
        if count is None or leaf not in ("qweight", "qzeros", "scales"):
            continue
        along_k = module.endswith(("o_proj", "down_proj"))
        if along_k:
            rows = count if leaf == "qweight" else count // group_size
            padding = (rows, value.shape[1])
        else:
            padding = (value.shape[0], count if leaf == "scales" else count // 8)
        # Code and zero point 8 with scale 1: a weight of 0.
        fill = torch.full(padding, 1 if leaf == "scales" else -0x77777778, dtype=value.dtype)
        tensors[name] = torch.cat([value, fill], dim=0 if along_k else 1).contiguous()
    config["num_attention_heads"] += ratio
    config["num_key_value_heads"] += 1
    config["intermediate_size"] += group_size
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json" and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
