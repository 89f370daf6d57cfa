#!/usr/bin/env python3
"""Times whole models against llama.cpp: `nibble bench model` and llama.cpp's own tools in turn, round
after round, with the same model, threads and tests; medians and ratios at the end.

  scripts/compare_llama.py build/models/SmolLM2-135M-Instruct-AWQ --bin LLAMA_BIN \\
      --gguf q4_0.gguf iq4_nl.gguf [--busy 1] [--json out.json]

LLAMA_BIN is a directory with llama-bench, llama-batched-bench and, for the time to the first token,
llama-completion, built by you. Every GGUF file is timed; the
fastest of each test is the one that counts. --busy N keeps N processes spinning meanwhile.
"""

import argparse
import json
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(command, timeout):
    """stdout; None if it failed or took too long."""
    words = [str(part) for part in command]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # so that what it started ends with it
    )
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        print(f"took longer than {timeout:.0f} s: {' '.join(words)}", file=sys.stderr)
        return None
    if process.returncode != 0:
        print(f"exit {process.returncode}: {' '.join(words)}", file=sys.stderr)
        return None
    return out


def json_lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def nibble_rates(args):
    command = [args.nibble, "bench", "model", args.model, "--mode", "w4a8", "--head", "int8"]
    command += ["-p", "512", "-n", "128", "-b", "1,8", "-r", "1", "--threads", args.threads]
    done = run(command + ["--output", "jsonl"], args.timeout)
    rates = {}
    for row in json_lines(done) if done else []:
        if row["batch"] == 1 and row["test"] in ("pp512", "tg128"):
            rates[row["test"]] = row["avg_ts"]
        elif row["test"] == "tg128@b8":
            rates["tg128 x 8"] = row["avg_ts"]
    return rates


def llama_rates(args, gguf):
    rates = {}
    command = [args.bin / "llama-bench", "-m", gguf, "-t", args.threads, "-r", "1"]
    done = run(command + ["-p", "512", "-n", "128", "-o", "jsonl"], args.timeout)
    for row in json_lines(done) if done else []:
        rates["pp512" if row["n_prompt"] else "tg128"] = row["avg_ts"]
    command = [args.bin / "llama-batched-bench", "-m", gguf, "-t", args.threads, "-c", "4096"]
    command += ["-npp", "16", "-ntg", "128", "-npl", "8", "--output-format", "jsonl"]
    done = run(command, args.timeout)
    for row in json_lines(done) if done else []:
        rates["tg128 x 8"] = row["speed_tg"]
    return rates


def time_processes(args):
    """Start to the 8th token, in processes of their own so that each peak memory is its own."""
    prompt = "The capital of France is"
    ours = [args.nibble, "generate", args.model, "--mode", "w4a8", "--head", "int8", "-p", prompt]
    ours += ["-n", "8", "--ignore-eos", "-c", "1024", "--threads", args.threads]
    contenders = {"nibble": ours}
    program = args.bin / "llama-completion"
    if program.exists():
        for gguf in args.gguf:
            contenders[gguf.name] = [program, "-m", gguf, "-t", args.threads, "-c", "1024"]
            contenders[gguf.name] += ["-p", prompt, "-n", "8", "-no-cnv", "--ignore-eos"]
    samples = {name: [] for name in contenders}
    for _ in range(args.rounds + 1):  # the first warms the file cache
        for name, command in contenders.items():
            text = json.dumps([str(part) for part in command])
            done = run([sys.executable, __file__, "--measure-process", text], args.timeout)
            if done:
                samples[name].append(json.loads(done))
    return {name: found[1:] for name, found in samples.items() if len(found) > 1}


def measure_process(command):
    start = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            stdin=subprocess.DEVNULL, check=False)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if result.returncode != 0:
        sys.exit(1)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def spread(values):
    return f"{statistics.median(values):9.1f} ({min(values):.1f}..{max(values):.1f})"


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--measure-process":
        measure_process(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=pathlib.Path, help="AWQ model directory")
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="llama.cpp's programs")
    parser.add_argument("--gguf", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--nibble", type=pathlib.Path, default=ROOT / "build" / "nibble")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, help="processes that spin meanwhile")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one program")
    parser.add_argument("--json", type=pathlib.Path, help="all samples, for docs/")
    args = parser.parse_args()

    spinners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)
    ]
    rates = {"nibble": {}} | {gguf.name: {} for gguf in args.gguf}
    try:
        for _ in range(args.rounds):
            found = {"nibble": nibble_rates(args)}
            for gguf in args.gguf:
                found[gguf.name] = llama_rates(args, gguf)
            for name, tests in found.items():
                for test, rate in tests.items():
                    rates[name].setdefault(test, []).append(rate)
        processes = time_processes(args)
    finally:
        for spinner in spinners:
            spinner.kill()

    print(f"tokens/s, median of {args.rounds} rounds (range), {args.threads} threads,", end=" ")
    print(f"{args.busy} busy processes")
    for test in ("pp512", "tg128", "tg128 x 8"):
        for name, tests in rates.items():
            if test in tests:
                print(f"  {test:10} {name:20} {spread(tests[test])}")
        peers = [
            statistics.median(tests[test])
            for name, tests in rates.items()
            if name != "nibble" and test in tests
        ]
        if peers and test in rates["nibble"]:
            ratio = statistics.median(rates["nibble"][test]) / max(peers)
            print(f"  {test:10} nibble / fastest      {ratio:9.2f}x")
    if processes:
        print("whole process, start to the 8th token: milliseconds, peak MiB")
    for name, found in processes.items():
        seconds = [1000 * sample["seconds"] for sample in found]
        peak = max(sample["peak_bytes"] for sample in found) / 2**20
        print(f"  {name:31} {spread(seconds)}  {peak:7.1f}")
    missing = [
        f"{name} {test}"
        for name, tests in rates.items()
        for test in ("pp512", "tg128", "tg128 x 8")
        if test not in tests
    ]
    if args.json:
        document = {"threads": args.threads, "busy": args.busy, "rates": rates}
        args.json.write_text(json.dumps(document | {"processes": processes}, indent=1) + "\n")
    if missing:
        sys.exit(f"no figure for {', '.join(missing)}")


if __name__ == "__main__":
    main()
