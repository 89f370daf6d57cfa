#!/usr/bin/env python3
"""Times an AWQ model in vLLM with the Nibble plugin against vLLM's own AWQ kernels, in turn, round
after round, with the same engine, threads and tests; medians and ratios at the end.

  build/venv-vllm/bin/python scripts/compare_vllm.py DIR [--mode w4a8] [--threads 2] [--json OUT]

Each contender is a process with an engine of its own and waits while another is timed:
  nibble          the plugin, in --mode
  vllm            vLLM's own path (--quantization awq); with AMX and bf16 that quantizes activations
                  to int8 too
  vllm w4a16      with --also-w4a16, the same held to 16-bit activations (VLLM_CPU_INT4_W4A8=0)
--profile also prints where the time of a step goes, by torch.profiler.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import time

PROMPT = 512
TESTS = {  # name: (sequences, tokens of the prompt, tokens made, unit counted)
    "prefill 512": (1, PROMPT, 1, "prompt"),
    "prefill 4 x 512": (4, PROMPT, 1, "prompt"),
    "decode": (1, 8, 49, "made"),
    "decode x 8": (8, 8, 49, "made"),
}


def preload():
    """vLLM's advice for CPUs: Intel's OpenMP, and tcmalloc where the package brings it."""
    root = pathlib.Path(sys.prefix)
    found = [*root.glob("lib/libiomp5.so"),
             *root.glob("lib/python3*/site-packages/vllm/libs/libtcmalloc_minimal*.so*")]
    return ":".join(map(str, found))


def environment(args):
    values = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(args.threads), "KMP_BLOCKTIME": "1", "KMP_TPAUSE": "0",
    }
    if not args.no_preload:
        values["LD_PRELOAD"] = preload()
    return values


# ---- a contender's process ----------------------------------------------------------------------


def serve(pipe, args, options):
    from vllm import LLM, SamplingParams

    llm = LLM(str(args.model), dtype=args.dtype, max_model_len=1024, max_num_seqs=8,
              max_num_batched_tokens=4 * PROMPT, enforce_eager=args.eager,
              skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    pipe.send(llm.apply_model(lambda model: sorted(
        {type(module.quant_method).__name__ for module in model.modules()
         if hasattr(module, "quant_method")}))[0])
    made = 0

    def generate(test):
        nonlocal made
        sequences, prompt, count, unit = test
        prompts = []
        for _ in range(sequences):
            made += 1
            prompts.append({"prompt_token_ids": [3 + (made * 7919 + i * 31) % 30000
                                                 for i in range(prompt)]})
        parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True,
                                    detokenize=False)
        start = time.perf_counter()
        steps = [0.0]
        if unit == "prompt":
            llm.generate(prompts, parameters, use_tqdm=False)
            return sequences * prompt / (time.perf_counter() - start)
        # Decoding alone: from the first token to the last, by the engine's steps.
        for index, entry in enumerate(prompts):
            llm.llm_engine.add_request(f"{made}-{index}", entry, parameters)
        llm.llm_engine.step()
        start = time.perf_counter()
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            steps.append(time.perf_counter() - start)
        return sequences * (count - 1) / steps[-1]

    while True:
        asked = pipe.recv()
        if asked is None:
            return
        name, profiled = asked
        if not profiled:
            pipe.send(generate(TESTS[name]))
            continue
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CPU]) as found:
            generate(TESTS[name])
        pipe.send(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12,
                                             max_name_column_width=40))


class Contender:
    def __init__(self, name, args, options, **changes):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        before = dict(os.environ)
        os.environ.update(environment(args) | changes)
        self.process = context.Process(target=serve, args=(theirs, args, options), daemon=True)
        self.process.start()
        os.environ.clear()
        os.environ.update(before)
        theirs.close()

    def ask(self, test, profiled=False):
        self.pipe.send((test, profiled))
        return self.pipe.recv()


# ---- the comparison -----------------------------------------------------------------------------


def spread(values):
    return f"{statistics.median(values):9.1f} ({min(values):.1f}..{max(values):.1f})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="AWQ model directory")
    parser.add_argument("--mode", default="w4a8")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--no-preload", action="store_true", help="without iomp and tcmalloc")
    parser.add_argument("--also-w4a16", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--wait", action="store_true",
                        help="wait for a line on stdin between loading and timing")
    parser.add_argument("--json", type=pathlib.Path, help="all samples, for docs/")
    args = parser.parse_args()

    own = {"quantization": "awq"}
    contenders = [
        Contender("nibble", args, {"additional_config": {"nibble": {"mode": args.mode}}}),
        Contender("vllm", args, own),
    ]
    if args.also_w4a16:
        contenders.append(Contender("vllm w4a16", args, own, VLLM_CPU_INT4_W4A8="0"))
    for contender in contenders:  # they load side by side
        methods = contender.pipe.recv()
        if ("NibbleLinearMethod" in methods) != (contender.name == "nibble"):
            sys.exit(f"{contender.name}: not what it is to measure: {methods}")
    if args.wait:
        print("loaded", file=sys.stderr, flush=True)
        sys.stdin.readline()
    rates = {contender.name: {test: [] for test in TESTS} for contender in contenders}
    for number in range(args.rounds + 1):
        for test in TESTS:
            for contender in contenders:
                rate = contender.ask(test)
                if number > 0:  # the first warms up
                    rates[contender.name][test].append(rate)

    print(f"{args.model}: tokens/s, median of {args.rounds} rounds (range), {args.dtype}, "
          f"{args.threads} threads, {'eager' if args.eager else 'compiled'}")
    for test in TESTS:
        for name, tests in rates.items():
            print(f"  {test:16} {name if name != 'nibble' else 'nibble ' + args.mode:14} "
                  f"{spread(tests[test])}")
        peers = {name: statistics.median(tests[test]) for name, tests in rates.items()
                 if name != "nibble"}
        ours = statistics.median(rates["nibble"][test])
        for name, rate in peers.items():
            print(f"  {test:16} {'nibble / ' + name:19} {ours / rate:5.2f}x")
    if args.profile:
        for test in TESTS:
            for contender in contenders:
                print(f"---- {test}: {contender.name}\n{contender.ask(test, True)}")
    if args.json:
        document = {"model": str(args.model), "mode": args.mode, "dtype": args.dtype,
                    "threads": args.threads, "eager": args.eager, "rates": rates}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    for contender in contenders:
        contender.pipe.send(None)


if __name__ == "__main__":
    main()
