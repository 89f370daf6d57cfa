"""What the tests of the vLLM plugin share: the environment of vLLM, and the C++ runner's tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NIBBLE = Path(os.environ.get("NIBBLE_TOOL", ROOT / "build/nibble"))
REAL_MODEL = Path(os.environ.get("NIBBLE_REAL_MODEL",
                                 ROOT / "build/models/SmolLM2-135M-Instruct-AWQ"))
PROMPT = "The capital of France is"

# One process where that is enough (each imports vLLM for 15 s), no network, few threads: more than
# one thread a core makes vLLM's own kernels collapse.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CACHE_ROOT": str(ROOT / "build/vllm-cache"),
}


def set_environment(**changes):
    """To be called before vLLM is imported."""
    os.environ.update(ENVIRONMENT | changes)


def runner_tokens(model, mode, count, *options, prompt=PROMPT):
    """What `nibble generate` appends to `prompt`, greedily: (tokens of the prompt, tokens)."""
    command = [NIBBLE, "generate", model, "-p", prompt, "-n", str(count), "--mode", mode,
               "--ignore-eos", "--json", *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          check=False, timeout=300)
    if done.returncode != 0:
        raise AssertionError(f"{command}: exit {done.returncode}\n{done.stderr}")
    result = json.loads(done.stdout)["results"][0]
    return result["prompt_tokens"], result["tokens"]


def run_python(script, *arguments, timeout, **environment):
    """Runs a Python program with vLLM's environment; returns its output, both streams together."""
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)],
                          env=os.environ | ENVIRONMENT | environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False, timeout=timeout)
    if done.returncode != 0:
        raise AssertionError(f"{script} {arguments}: exit {done.returncode}\n{done.stdout[-6000:]}")
    return done.stdout
