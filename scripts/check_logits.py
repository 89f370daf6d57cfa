#!/usr/bin/env python3
"""Compare whole models with transformers, live: random ones of every architecture, and a real one.

The random models are made as in scripts/make_model_goldens.py, but larger and of another shape for
every seed, 16-bit and quantized, with prompts over several chunks of the KV cache. Fails if a logit
is off by more than 1e-3 of the largest.

The real model (--model DIR, skipped if it is not there) continues three prompts greedily. Where it
leaves transformers' path, the logits of the two tokens must be within 1e-2 of the largest logit. If
DIR-AWQ is there too, its logits are compared with those of the same weights, dequantized here.

Needs the packages of python/requirements-torch.txt, and build/nibble and build/model_logits.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import make_model_goldens as goldens
import numpy as np
import torch
import transformers as tf

ROOT = goldens.ROOT
TOLERANCE = 1e-3
MARGIN = 1e-2
NEW_TOKENS = 64
QUESTIONS = [
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Explain in a few sentences why the sky is blue.",
]


def run_model(program, directory, mode, tokens, *options):
    done = subprocess.run([program, directory, mode, *options], check=False, capture_output=True,
                          input=" ".join(str(int(t)) for t in tokens).encode())
    if done.returncode != 0:
        raise goldens.Failure(f"{directory}: {done.stderr.decode().strip()}")
    return done.stdout


# ---- random models ------------------------------------------------------------------------------


def random_rope(rng, family):
    def plain():
        return {"rope_type": "default", "rope_theta": 10 ** rng.uniform(3, 6)}
    if family == "gemma3":
        full = {**plain(), "rope_type": "linear", "factor": rng.choice([2.0, 8.0])}
        return {"sliding_attention": plain(), "full_attention": full}
    if family != "llama":
        return plain()
    return rng.choice([
        plain(), {**plain(), "rope_type": "linear", "factor": 4.0},
        {**plain(), "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 64}])


def random_case(family, seed, group_size):
    """A config of sizes that the family allows and that groups divide, if there are any."""
    rng = random.Random(f"{family} {seed} {group_size}")
    step = max(group_size, 8)
    while True:
        heads_per_kv, kv_heads = rng.choice([(1, 2), (2, 2), (3, 1), (4, 2), (7, 1), (8, 1)])
        heads = heads_per_kv * kv_heads
        hidden, head_dim = rng.randrange(step, 400, step), rng.choice([16, 24, 64, 80, 128])
        if family == "qwen2":  # has no head_dim of its own
            head_dim = hidden // heads
        if hidden % heads == 0 and head_dim % 8 == 0 and heads * head_dim % step == 0 and \
                hidden >= 64:
            break
    layers = rng.randint(2, 6)
    config = {
        "hidden_size": hidden, "intermediate_size": rng.randrange(step, 600, step),
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": rng.randint(100, 700), "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "tie_word_embeddings": family == "gemma3" or rng.random() < 0.5,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": random_rope(rng, family)}
    if family != "qwen2":
        config["head_dim"] = head_dim
    if family == "llama":
        config.update(attention_bias=rng.random() < 0.3, mlp_bias=rng.random() < 0.3)
    window = rng.choice([1, 5, 63, 64, 65, 150])
    if family == "mistral":
        config["sliding_window"] = rng.choice([window, None])
    elif family.startswith("qwen"):
        config.update(use_sliding_window=rng.random() < 0.5, sliding_window=window,
                      max_window_layers=rng.randint(0, layers))
    elif family == "gemma3":
        config.update(sliding_window=window, query_pre_attn_scalar=rng.choice([6, 16, 100]))
        if rng.random() < 0.5:
            config["layer_types"] = [rng.choice(["sliding_attention", "full_attention"])
                                     for _ in range(layers)]
    form = rng.choice(["text", "mm", "mm_nested"]) if family == "gemma3" else "text"
    default_pattern = "layer_types" not in config
    return goldens.Case(
        f"{family}-{seed}{f'-g{group_size}' if group_size else ''}", family,
        rng.choice(["bf16", "f16", "f32"]), config, tokens=rng.randint(130, 280), seed=seed,
        legacy=default_pattern and rng.random() < 0.5, form=form, group_size=group_size,
        scale_dtype=rng.choice(["f16", "bf16"]))


def check_random(case, args):
    """max |difference| / max |logit| of one random model."""
    generator = torch.Generator().manual_seed(case.seed)
    weights = goldens.random_weights(case, generator)
    tokens = torch.randint(0, case.config["vocab_size"], (case.tokens,), generator=generator)
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work) / "source"
        goldens.write_checkpoint(case, weights, directory)
        if case.group_size:
            quantized = goldens.quantize(case, directory, Path(work) / "awq", args.nibble)
            directory = Path(work) / "awq"
            weights = text_weights(goldens.dequantize(quantized))
        out = run_model(args.program, directory, "w4a16" if case.group_size else "16bit", tokens)
    golden = goldens.logits_of(goldens.build(case.family, case.config, weights), tokens)
    logits = torch.from_numpy(np.frombuffer(out, np.float32).copy()).view(golden.shape)
    return goldens.relative(logits, golden)


def text_weights(weights):
    """The decoder of a multimodal model under the names of a text model."""
    named = {}
    for name, value in weights.items():
        for prefix in ("language_model.model.", "model.language_model."):
            if name.startswith(prefix):
                named["model." + name.removeprefix(prefix)] = value
    return named or weights


def check_all_random(args):
    ok = True
    for family in goldens.FAMILIES:
        for group_size in (0, 32, 64, 128):
            worst = (0.0, "")
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                case = random_case(family, seed, group_size)
                worst = max(worst, (check_random(case, args), case.name))
            form = f"w4a16 g={group_size}" if group_size else "16 bits"
            print(f"{family:8s} {form:12s} {args.seeds} models, worst error {worst[0]:.2g} "
                  f"({worst[1]})", flush=True)
            ok = ok and worst[0] <= TOLERANCE  # false for NaN
    return ok


# ---- the real model -----------------------------------------------------------------------------


def check_path(model, prompt, ours, name):
    """Follows our greedy path in transformers; margin of the first token that it would not take."""
    logits = goldens.logits_of(model, list(prompt) + ours[:-1])[len(prompt) - 1:]
    theirs = logits.argmax(-1)
    differs = (theirs != torch.tensor(ours)).nonzero()
    if len(differs) == 0:
        print(f"  {name}: all {len(ours)} tokens agree")
        return True
    at = int(differs[0])
    row = logits[at]
    margin = float((row[theirs[at]] - row[ours[at]]) / row.abs().max())
    print(f"  {name}: leaves at token {at} ({int(theirs[at])}, not {ours[at]}), margin "
          f"{margin:.2g} of the largest logit")
    return margin <= MARGIN


def check_prompt(model, directory, mode, prompt, args):
    golden = goldens.logits_of(model, prompt)
    out = run_model(args.program, directory, mode, prompt)
    logits = torch.from_numpy(np.frombuffer(out, np.float32).copy()).view(golden.shape)
    error = goldens.relative(logits, golden)
    print(f"{directory.name}: logits of {len(prompt)} tokens: error {error:.2g}", flush=True)
    return error <= TOLERANCE


def check_real(args):
    """Logits of whole prompts, then greedy paths; then the quantized model, if there is one."""
    tokenizer = tf.AutoTokenizer.from_pretrained(args.model)
    ok = True
    models = {name: tf.AutoModelForCausalLM.from_pretrained(
                  args.model, dtype=dtype, attn_implementation="eager").eval()
              for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                             tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        print(f"{args.model.name}: {question}")
        ok = check_prompt(models["float32"], args.model, "16bit", prompt, args) and ok
        for kv in ("f32", "bf16"):
            out = run_model(args.program, args.model, "16bit", prompt, "--greedy",
                            str(NEW_TOKENS), "--kv", kv)
            ours = [int(line.split()[0]) for line in out.decode().splitlines()]
            for name, model in models.items():
                ok = check_path(model, prompt, ours, f"cache {kv}, against {name}") and ok
    quantized = args.model.with_name(args.model.name + "-AWQ")
    if (quantized / "config.json").exists():
        weights = goldens.dequantize(goldens.load_file(quantized / "model.safetensors"))
        models["float32"].load_state_dict({name: w.float() for name, w in weights.items()},
                                          strict=False)
        ok = check_prompt(models["float32"], quantized, "w4a16", prompt, args) and ok
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--program", type=Path, default=ROOT / "build/model_logits")
    parser.add_argument("--nibble", type=Path, default=ROOT / "build/nibble")
    parser.add_argument("--model", type=Path,
                        default=ROOT / "build/models/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, default=4, help="random models of each kind")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--only", choices=["random", "real"])
    args = parser.parse_args()
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    ok = True
    try:
        if args.only != "real":
            ok = check_all_random(args)
        if args.only != "random":
            if (args.model / "config.json").exists():
                ok = check_real(args) and ok
            else:
                print(f"skipped: {args.model} is not there; scripts/demo.sh makes it")
    except (goldens.Failure, OSError, subprocess.CalledProcessError) as error:
        print(f"check_logits: error: {error}", file=sys.stderr)
        return 1
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
