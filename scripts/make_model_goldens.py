#!/usr/bin/env python3
"""Make tests/golden/models: tiny random models with the logits that transformers gives for them.

Every directory holds a checkpoint (config.json, model.safetensors) and golden.safetensors:

    tokens            I32 [T]         the prompt
    logits            F32 [T, vocab]  float32, eager attention, from exactly the stored weights
    greedy            I32 [16]        what greedy decoding appends to the prompt
    last_logits_bf16  F32 [vocab]     logits of the last position with keys and values rounded to
    last_logits_f16                   bf16 or f16 as they enter the cache
    last_logits_w4a8  F32 [vocab]     quantized models: logits of the last position with the inputs
    last_logits_w4a4                  of all linears rounded as these modes do by default

A golden proves nothing about a feature that does not show in it. So for each feature of a model
(window, bias, rope scaling, ...) the script switches it off or gets it wrong on purpose, and fails
unless the logits then differ by 1000 times the tolerance of the tests; ablations.tsv keeps what it
measured. The quantized models are made by `nibble quantize`, but dequantized here with numpy.

Needs the packages of python/requirements-torch.txt and build/nibble. No GPU, no network.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same bits on every run
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers as tf  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests/golden/models"
TOLERANCE = 1e-4  # of tests/test_model.cc: max |difference| / max |golden|
GREEDY = 16
MODES = ("w4a8", "w4a4")
MARGIN = 1e-2  # greedy steps must be decided by more than this, relative to max |logit|

FAMILIES = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM),
    "gemma3": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Failure(Exception):
    """Something the user can act on; the message is all they need."""


def say(text):
    print(f"make_model_goldens: {text}", file=sys.stderr, flush=True)


# ---- models -------------------------------------------------------------------------------------


@dataclass
class Case:
    name: str
    family: str
    dtype: str
    config: dict
    ablations: list = field(default_factory=list)
    tokens: int = 40
    seed: int = 2
    legacy: bool = False     # config.json with the rope keys of transformers 4
    form: str = "text"       # "text", or the names of a multimodal model: "mm", "mm_nested"
    group_size: int = 0      # > 0: quantized by nibble
    scale_dtype: str = "f16"


def rounded_scale(weights, hidden):
    """Gemma's embedding factor as a model kept in its stored type has it."""
    dtype = weights["model.embed_tokens.weight"].dtype
    return float(torch.tensor(hidden**0.5).to(dtype))


def build(family, config, weights):
    """A float32 model of exactly these weights, whatever type they are stored in."""
    config_class, model_class = FAMILIES[family]
    settings = config_class(**copy.deepcopy(config))
    settings._attn_implementation = "eager"
    model = model_class(settings).eval()
    missing, unexpected = model.load_state_dict(
        {name: value.float() for name, value in weights.items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or \
            (missing and not settings.tie_word_embeddings):
        raise Failure(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    if family == "gemma3":
        model.model.embed_tokens.embed_scale.fill_(rounded_scale(weights, settings.hidden_size))
    return model


def random_weights(case, generator):
    """Values of a realistic scale; nothing is 0 or 1, so that everything shows."""
    _, model_class = FAMILIES[case.family]
    gemma = case.family == "gemma3"
    settings = FAMILIES[case.family][0](**copy.deepcopy(case.config))
    with torch.device("meta"):
        shapes = model_class(settings).state_dict()
    weights = {}
    for name, like in shapes.items():
        if name == "lm_head.weight" and settings.tie_word_embeddings:
            continue
        shape = tuple(like.shape)
        normal = torch.randn(shape, generator=generator)
        uniform = torch.rand(shape, generator=generator)
        if name.endswith("embed_tokens.weight"):
            value = normal * (1.5 * shape[1]**-0.5 if gemma else 0.5)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            value = 0.8 + 1.2 * uniform - (1 if gemma else 0)
        elif name.endswith("norm.weight"):
            value = 0.5 + uniform - (1 if gemma else 0) + (0.3 if gemma else 0)
        elif name.endswith(".bias"):
            value = normal * 0.6
        else:
            value = normal * (1.5 * shape[1]**-0.5)
        weights[name] = value.to(DTYPES[case.dtype])
    return weights


@torch.no_grad()
def logits_of(model, tokens, kv_dtype=None):
    """float32 logits [T, vocab] of a prompt."""
    extra = {}
    if kv_dtype is not None:
        extra = {"past_key_values": RoundingCache(kv_dtype), "use_cache": True}
    else:
        extra = {"use_cache": False}
    return model(torch.as_tensor(tokens)[None].long(), **extra).logits[0].float()


class RoundingCache(tf.DynamicCache):
    """Keys and values as a cache of 16-bit elements gives them back."""

    def __init__(self, dtype):
        super().__init__()
        self.rounded_to = dtype

    def update(self, key_states, value_states, *args, **kwargs):
        def rounded(x):
            return x.to(self.rounded_to).float()
        return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)


def relative(value, golden):
    return float((value - golden).abs().max() / golden.abs().max())


def rounded_input(x, mode, group):
    """x as the products of `mode` see it; `group` channels share a scale, 0: all of a token."""
    blocks = x.unflatten(-1, (-1, group or x.shape[-1]))
    if mode == "w4a8":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = (blocks / scale).round()
    else:
        low = blocks.amin(-1, keepdim=True).clamp(max=0)
        high = blocks.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale).round()
        codes = (blocks / scale).clamp(-zero, 15 - zero).round()
    return (codes * scale).flatten(-2)


def logits_of_mode(model, tokens, mode, group):
    """Default mix: per group where AWQ smooths nothing (o, down) and for w4a4, else per token."""
    def hook(per_group):
        return lambda module, args: (rounded_input(args[0], mode, group if per_group else 0),)
    hooks = [module.register_forward_pre_hook(
                 hook(mode == "w4a4" or name.endswith(("o_proj", "down_proj"))))
             for name, module in model.named_modules() if name.endswith("_proj")]
    logits = logits_of(model, tokens)
    for h in hooks:
        h.remove()
    return logits


def greedy(model, tokens, count):
    """The continuation, and the smallest margin between the best token and the next."""
    sequence, margin = list(tokens), float("inf")
    for _ in range(count):
        logits = logits_of(model, sequence)
        best = logits[-1].topk(2)
        margin = min(margin, float((best.values[0] - best.values[1]) / logits.abs().max()))
        sequence.append(int(best.indices[0]))
    return sequence[len(tokens):], margin


# ---- ablations: fn(config, weights) changes both in place ---------------------------------------


def setting(key, value, title=None):
    """`key` may be a path of dots into dictionaries."""
    def apply(config, weights):
        *path, last = key.split(".")
        for part in path:
            config = config[part]
        config[last] = value
    return title or f"{key} = {value}", apply


def changed(title, suffix, fn):
    """fn of every tensor whose name ends so."""
    def apply(config, weights):
        names = [name for name in weights if name.endswith(suffix)]
        assert names, suffix
        for name in names:
            weights[name] = fn(weights[name].float()).to(weights[name].dtype)
    return title, apply


def without_bias(linear):
    return changed(f"{linear} bias 0", f"{linear}.bias", torch.zeros_like)


def without_norm(norm, gemma=False):
    return changed(f"{norm} left out", f"{norm}.weight",
                   torch.zeros_like if gemma else torch.ones_like)


def heads_of(config):
    heads = config["num_attention_heads"]
    return heads, config["num_key_value_heads"], \
        config.get("head_dim") or config["hidden_size"] // heads


def interleaved_groups():
    """Query head h reads KV head h % kv_heads instead of h / groups."""
    def apply(config, weights):
        heads, kv_heads, head_dim = heads_of(config)
        groups = heads // kv_heads
        # position h of the repaired layout holds the query head that reads its KV head
        order = [(h % groups) * kv_heads + h // groups for h in range(heads)]
        rows = torch.cat([torch.arange(head_dim) + h * head_dim for h in order])
        for name in list(weights):
            if ".q_proj." in name:
                weights[name] = weights[name][rows]
            elif name.endswith("o_proj.weight"):
                weights[name] = weights[name][:, rows]
    return "query heads dealt over KV heads", apply


def interleaved_pairs():
    """Rope rotates (2i, 2i + 1) instead of (i, i + head_dim / 2)."""
    def apply(config, weights):
        heads, kv_heads, head_dim = heads_of(config)
        order = torch.arange(head_dim).view(-1, 2).T.reshape(-1)
        for name in list(weights):
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weights[name] = weights[name][order]
                continue
            count = heads if ".q_proj." in name else kv_heads if ".k_proj." in name else 0
            if count:
                rows = torch.cat([order + h * head_dim for h in range(count)])
                weights[name] = weights[name][rows]
    return "rope pairs neighbours", apply


def other_embedding_scale(title, scale_of):
    def apply(config, weights):
        name, hidden = "model.embed_tokens.weight", config["hidden_size"]
        # The head keeps the embedding as it was. In float32 build() rounds no scale.
        weights["lm_head.weight"] = weights[name]
        weights[name] = weights[name].float() * (scale_of(hidden) / hidden**0.5)
        config["tie_word_embeddings"] = False
    return title, apply


NO_EMBEDDING_SCALE = other_embedding_scale("embedding not scaled", lambda hidden: 1.0)
EXACT_EMBEDDING_SCALE = other_embedding_scale("embedding scale not rounded",
                                              lambda hidden: hidden**0.5)
# Wrong by so little that 1000 times the tolerance cannot be asked for; must still be seen.
SMALL = {EXACT_EMBEDDING_SCALE[0], "hidden_activation = gelu"}


def rope_everywhere(title, source, target):
    def apply(config, weights):
        rope = config["rope_parameters"]
        rope[target] = copy.deepcopy(rope[source])
    return title, apply


PLAIN = [interleaved_groups(), interleaved_pairs(), without_norm("input_layernorm"),
         without_norm("post_attention_layernorm"), without_norm("model.norm"),
         setting("hidden_act", "gelu_pytorch_tanh")]
GEMMA_NORMS = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
               "post_feedforward_layernorm", "q_norm", "k_norm", "model.norm"]


def gemma_ablations(sliding_window, head_dim):
    return [
        interleaved_groups(), interleaved_pairs(),
        *(without_norm(norm, gemma=True) for norm in GEMMA_NORMS),
        *(changed(f"{norm}: w for 1 + w", f"{norm}.weight", lambda w: w - 1)
          for norm in GEMMA_NORMS),
        setting("sliding_window", 4096), setting("sliding_window", sliding_window + 1),
        setting("sliding_window", sliding_window - 1),
        setting("query_pre_attn_scalar", head_dim), NO_EMBEDDING_SCALE,
        setting("rope_parameters.full_attention", {"rope_type": "default", "rope_theta": 10000.0},
                "rope of full layers not scaled"),
        rope_everywhere("rope of full layers everywhere", "full_attention", "sliding_attention"),
        rope_everywhere("rope of sliding layers everywhere", "sliding_attention",
                        "full_attention"),
        setting("hidden_activation", "silu"), setting("hidden_activation", "gelu"),
    ]


# ---- the cases ----------------------------------------------------------------------------------


def cases():
    sliding, full = "sliding_attention", "full_attention"
    base = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 80,
            "max_position_embeddings": 256}
    llama3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

    yield Case("llama3_rope", "llama", "bf16", {
        **base, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "eos_token_id": [2, 3, 4], "rope_parameters": llama3},
        legacy=True, ablations=[
            *PLAIN, setting("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0},
                            "rope not scaled"),
            setting("rope_parameters.factor", 2.0), setting("rope_parameters.low_freq_factor", 2.0),
            setting("rope_parameters.high_freq_factor", 3.0),
            setting("rope_parameters.rope_theta", 500000.0),
            setting("rope_parameters.original_max_position_embeddings", 256)])

    # tied, all biases, a head of 24 channels, heads that are not the hidden size, one KV head
    yield Case("llama_bias", "llama", "f32", {
        **base, "hidden_size": 42, "intermediate_size": 28, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "rms_norm_eps": 0.3,
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        seed=1, ablations=[
            *PLAIN[1:], *(without_bias(linear) for linear in (
                "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
            setting("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0},
                    "rope not scaled"),
            setting("rms_norm_eps", 1e-5)])

    # longer than two chunks of 64 positions, a window much smaller than one, more than 64 channels
    yield Case("mistral", "mistral", "bf16", {
        **base, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 72, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "sliding_window": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        legacy=True, tokens=140, ablations=[
            *PLAIN[1:], setting("sliding_window", None), setting("sliding_window", 19),
            setting("sliding_window", 21), setting("rope_parameters.rope_theta", 10000.0)])

    yield Case("qwen2", "qwen2", "bf16", {
        **base, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        ablations=[
            *PLAIN, without_bias("q_proj"), without_bias("k_proj"), without_bias("v_proj"),
            setting("rope_parameters.rope_theta", 10000.0)])

    # a window longer than a chunk; layer_types is not in the file
    yield Case("qwen2_window", "qwen2", "f16", {
        **base, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 70,
        "max_window_layers": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        legacy=True, tokens=140, ablations=[
            *PLAIN[1:], without_bias("q_proj"), without_bias("k_proj"), without_bias("v_proj"),
            setting("use_sliding_window", False), setting("max_window_layers", 0),
            setting("max_window_layers", 2), setting("sliding_window", 69),
            setting("sliding_window", 71)])

    yield Case("qwen3", "qwen3", "bf16", {
        **base, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 0.3,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        ablations=[*PLAIN, without_norm("q_norm"), without_norm("k_norm"),
                   setting("rms_norm_eps", 1e-6)])

    # sqrt(56) is far from its bf16 neighbour; 4 x 16 channels of heads are not 56
    yield Case("gemma3", "gemma3", "bf16", {
        **base, "hidden_size": 56, "intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 6, "sliding_window": 9,
        "layer_types": [sliding, full, sliding, full],
        "rope_parameters": {
            sliding: {"rope_type": "default", "rope_theta": 1000.0},
            full: {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}},
        tokens=100, ablations=[
            *gemma_ablations(9, 16), EXACT_EMBEDDING_SCALE,
            setting("layer_types", [full, sliding, full, sliding], "layer types the other way")])

    # MedGemma's forms: the same model under two sets of names and two generations of config.json.
    # Seven layers, so that the default pattern has a full one and ends with a sliding one.
    mm = {**base, "hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 7,
          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6,
          "query_pre_attn_scalar": 6, "sliding_window": 8, "eos_token_id": [1, 6],
          "rope_parameters": {
              sliding: {"rope_type": "default", "rope_theta": 2000.0},
              full: {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}}}
    mm_ablations = [*gemma_ablations(8, 16)[1:],
                    setting("layer_types", [full] + [sliding] * 6, "another layer is full")]
    yield Case("gemma3_mm", "gemma3", "bf16", mm, mm_ablations, legacy=True, form="mm")
    yield Case("gemma3_mm_nested", "gemma3", "bf16", mm, form="mm_nested")

    yield Case("llama_awq", "llama", "f16", {
        **base, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, group_size=32)
    # biases and embedding in bf16 beside scales in f16
    yield Case("qwen2_awq", "qwen2", "bf16", {
        **base, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, group_size=32)
    yield Case("gemma3_awq", "gemma3", "bf16", {
        **base, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 12, "sliding_window": 9,
        "layer_types": [sliding, full, sliding, full],
        "rope_parameters": {
            sliding: {"rope_type": "default", "rope_theta": 1000.0},
            full: {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}},
        group_size=32, scale_dtype="bf16")


# ---- checkpoints --------------------------------------------------------------------------------


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def stored_config(case):
    """The config object to save, with the type of the weights in it."""
    config_class, model_class = FAMILIES[case.family]
    settings = config_class(**copy.deepcopy(case.config))
    if case.form == "text":
        settings.architectures = [model_class.__name__]
    else:  # the smallest vision tower that a reader can be asked to step over
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                  "num_attention_heads": 1, "image_size": 4, "patch_size": 2,
                  "vision_use_head": False}
        settings = tf.Gemma3Config(text_config=settings.to_dict(), vision_config=vision,
                                   mm_tokens_per_image=4)
        settings.architectures = ["Gemma3ForConditionalGeneration"]
    settings.dtype = DTYPES[case.dtype]
    return settings


def legacy_config(document):
    """config.json with the rope keys, and without layer types, as transformers 4 wrote it."""
    text = document.get("text_config", document)
    rope = text.pop("rope_parameters")
    text.pop("layer_types", None)
    text.pop("_sliding_window_pattern", None)
    if "full_attention" in rope:
        text["rope_theta"] = rope["full_attention"].pop("rope_theta")
        text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    else:
        text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    document["torch_dtype"] = document.pop("dtype")
    document["transformers_version"] = "4.51.3"
    return document


def multimodal_weights(case, weights):
    """The names of a Gemma3ForConditionalGeneration around the text weights."""
    generator = torch.Generator().manual_seed(case.seed)
    with torch.device("meta"):
        shapes = tf.Gemma3ForConditionalGeneration(stored_config(case)).state_dict()
    named = {}
    for name, value in weights.items():
        named[name.replace("model.", "language_model.model.", 1) if case.form == "mm"
              else name.replace("model.", "model.language_model.", 1)] = value
    for name, like in shapes.items():
        if "language_model" in name or name.startswith("lm_head"):
            continue
        value = torch.randn(tuple(like.shape), generator=generator).to(DTYPES[case.dtype])
        # "model.vision_tower.encoder...": files have a "vision_model" in between
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        named[name.removeprefix("model.") if case.form == "mm" else name] = value
    return named


def write_checkpoint(case, weights, directory):
    directory.mkdir(parents=True)
    if case.form != "text":
        weights = multimodal_weights(case, weights)
    save_file({name: value.contiguous() for name, value in sorted(weights.items())},
              directory / "model.safetensors", metadata={"format": "pt"})
    stored_config(case).save_pretrained(directory)
    document = read_json(directory / "config.json")
    if case.legacy:
        document = legacy_config(document)
    write_json(directory / "config.json", document)


def reload_logits(case, directory, tokens):
    """transformers' own reading of what was written."""
    kind = FAMILIES[case.family][1] if case.form == "text" else tf.Gemma3ForConditionalGeneration
    model, info = kind.from_pretrained(directory, dtype=torch.float32,
                                       attn_implementation="eager", output_loading_info=True)
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise Failure(f"{case.name}: transformers found {wrong}")
    if case.family == "gemma3":
        text = model.model if case.form == "text" else model.model.language_model
        text.embed_tokens.embed_scale.fill_(float(
            torch.tensor(case.config["hidden_size"]**0.5).to(DTYPES[case.dtype])))
    return logits_of(model.eval(), tokens)


# ---- quantized checkpoints ----------------------------------------------------------------------


def unpack(words):
    """int32 [R, C] -> uint8 [R, 8 C]: column 8c + j is 4 bits at this shift of word c."""
    shifts = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)
    values = (words.view(np.uint32)[:, :, None] >> shifts) & 15
    return values.reshape(words.shape[0], -1).astype(np.float32)


def dequantize(tensors, zero=None):
    """Weights (q - z) * s, [N, K] as transformers has them; `zero` in place of every z."""
    weights = {}
    for name, value in tensors.items():
        prefix, _, suffix = name.rpartition(".")
        if suffix in ("qzeros", "scales"):
            continue
        if suffix != "qweight":
            weights[name] = value
            continue
        scales = tensors[prefix + ".scales"].float().numpy()
        codes = unpack(value.numpy())
        zeros = unpack(tensors[prefix + ".qzeros"].numpy())
        if zero is not None:
            zeros[:] = zero
        group = codes.shape[0] // scales.shape[0]
        w = (codes - np.repeat(zeros, group, 0)) * np.repeat(scales, group, 0)
        weights[prefix + ".weight"] = torch.from_numpy(w.T.copy())
    return weights


def quantize(case, source, directory, nibble):
    subprocess.run([nibble, "quantize", source, directory, "--method", "rtn", "--group-size",
                    str(case.group_size), "--scale-dtype", case.scale_dtype],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tensors = load_file(directory / "model.safetensors")
    linears = case.config["num_hidden_layers"] * 7
    if sum(name.endswith(".qweight") for name in tensors) != linears:
        raise Failure(f"{case.name}: {linears} linears were to be quantized")
    return tensors


# ---- goldens ------------------------------------------------------------------------------------


def measure(case, weights, tokens, golden):
    """Runs every ablation; rows (case, what, relative change)."""
    rows = []
    for title, apply in case.ablations:
        config, changed_weights = copy.deepcopy(case.config), dict(weights)
        apply(config, changed_weights)
        change = relative(logits_of(build(case.family, config, changed_weights), tokens), golden)
        rows.append((case.name, title, change))
    return rows


def check_ablations(rows):
    weak = [f"{name}: {what} changes the logits by {change:.2g} only"
            for name, what, change in rows
            if change < (2 if what in SMALL else 1000) * TOLERANCE]
    if weak:
        raise Failure("; ".join(weak))


def has_ties(case, model, tokens):
    """Does an input lie so near the middle of two codes that float32 and float64 disagree?"""
    if not case.group_size:
        return False
    single = [logits_of_mode(model, tokens, mode, case.group_size) for mode in MODES]
    double = [logits_of_mode(model.double(), tokens, mode, case.group_size) for mode in MODES]
    model.float()
    return any(relative(a, b) > TOLERANCE / 10 for a, b in zip(single, double))


def choose_prompt(case, model):
    """A random prompt whose greedy continuation is decided clearly at every step."""
    best = (-1.0, None, None)
    for seed in range(400):
        generator = torch.Generator().manual_seed(1000 * case.seed + seed)
        tokens = torch.randint(3, case.config["vocab_size"], (case.tokens,), generator=generator)
        continuation, margin = greedy(model, tokens.tolist(), GREEDY)
        if margin > MARGIN and not has_ties(case, model, tokens):
            return tokens, continuation, margin
        best = max(best, (margin, tokens, continuation), key=lambda b: b[0])
    raise Failure(f"{case.name}: no prompt has a greedy margin above {best[0]:.2g}")


def make_case(case, directory, nibble):
    """Writes one directory; rows of what was measured on the way."""
    weights = random_weights(case, torch.Generator().manual_seed(case.seed))
    if case.group_size:
        with tempfile.TemporaryDirectory() as work:
            write_checkpoint(case, weights, Path(work) / "source")
            quantized = quantize(case, Path(work) / "source", Path(work) / "awq", nibble)
            shutil.copytree(Path(work) / "awq", directory)
        weights = dequantize(quantized)
    else:
        write_checkpoint(case, weights, directory)
    model = build(case.family, case.config, weights)
    tokens, continuation, margin = choose_prompt(case, model)
    golden = logits_of(model, tokens)

    if case.group_size:
        wrong = build(case.family, case.config, dequantize(quantized, zero=8))
        rows = [(case.name, "every zero point 8", relative(logits_of(wrong, tokens), golden))]
    else:
        rows = measure(case, weights, tokens, golden)
        again = relative(reload_logits(case, directory, tokens), golden)
        if again > 1e-6:
            raise Failure(f"{case.name}: transformers reads the directory otherwise ({again:.2g})")
    check_ablations(rows)

    stored = {"tokens": tokens.int(), "logits": golden,
              "greedy": torch.tensor(continuation, dtype=torch.int32)}
    for name in ("bf16", "f16"):
        value = logits_of(model, tokens, DTYPES[name])
        stored[f"last_logits_{name}"] = value[-1].clone()
        rows.append((case.name, f"(keys and values in {name})", relative(value, golden)))
    for mode in MODES if case.group_size else ():
        value = logits_of_mode(model, tokens, mode, case.group_size)
        stored[f"last_logits_{mode}"] = value[-1].clone()
        rows.append((case.name, f"({mode})", relative(value, golden)))
    noise = relative(logits_of(model.double(), tokens), golden)
    if noise > TOLERANCE / 10:
        raise Failure(f"{case.name}: float32 itself is off by {noise:.2g}")
    rows += [(case.name, "(float64 instead of float32)", noise),
             (case.name, "(smallest greedy margin)", margin)]

    # One key: safetensors writes several in random order.
    save_file(stored, directory / "golden.safetensors", metadata={
        "made_with": f"torch {torch.__version__.split('+')[0]}, transformers {tf.__version__}"})
    keep = ("config.json", "model.safetensors", "golden.safetensors")
    for path in directory.iterdir():
        if path.name in keep:
            path.chmod(0o644)
        else:
            path.unlink()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--nibble", type=Path, default=ROOT / "build/nibble")
    parser.add_argument("--only", nargs="*", help="these cases; the others stay as they are")
    parser.add_argument("--dry-run", action="store_true", help="measure, write nothing")
    args = parser.parse_args()
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    rows = []
    try:
        with tempfile.TemporaryDirectory() as work:
            for case in cases():
                if args.only and case.name not in args.only:
                    continue
                made = make_case(case, Path(work) / case.name, args.nibble)
                for name, what, value in made:
                    print(f"{name}\t{what}\t{value:.3g}")
                rows += made
                if not args.dry_run:
                    shutil.rmtree(OUT / case.name, ignore_errors=True)
                    shutil.copytree(Path(work) / case.name, OUT / case.name)
        if not args.dry_run and not args.only:
            lines = [f"{name}\t{what}\t{value:.2g}\n" for name, what, value in rows]
            (OUT / "ablations.tsv").write_text(
                "model\twhat is wrong\tmax |change| / max |logit|\n" + "".join(lines))
    except (Failure, OSError, subprocess.CalledProcessError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
