#!/usr/bin/env python3
"""Fail if a CUDA kernel spills registers to local memory, or its wgmma is serialized.

usage: check_spills.py LOGS [--table]

LOGS is the folder `ptxas` of a build directory: what `nvcc -Xptxas -v` said, a file per .cu file.
Stack frames count too: an array that is indexed at run time lies in local memory."""

import pathlib
import re
import shutil
import subprocess
import sys

COMPILING = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SERIALIZED = re.compile(r".*wgmma.*serializ.*", re.I)


def kernels(text):
    """(function, architecture, stack bytes, spilled bytes, registers) of each kernel of one log."""
    found, at = [], None
    for line in text.splitlines():
        if match := COMPILING.search(line):
            at = [match[1], match[2], 0, 0, 0]
            found.append(at)
        elif at and (match := FRAME.search(line)):
            at[2], at[3] = int(match[1]), int(match[2]) + int(match[3])
        elif at and (match := REGISTERS.search(line)):
            at[4] = int(match[1])
    return found


def readable(function):
    """w4a8_rs_sm90<160, 32, false> of a mangled name, where c++filt is installed."""
    if not shutil.which("c++filt"):
        return function
    name = subprocess.run(["c++filt", function], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|nibble::cuda::|^void |\((int|bool)\)", "", name)
    return name.split("(")[0]


def main():
    logs = sorted(pathlib.Path(sys.argv[1]).glob("*.log")) if len(sys.argv) > 1 else []
    if not logs:
        sys.exit(__doc__ if len(sys.argv) < 2 else f"{sys.argv[1]}: no *.log")
    bad = total = 0
    for log in logs:
        text = log.read_text()
        for line in filter(SERIALIZED.match, text.splitlines()):
            bad += 1
            print(f"{log.stem}: {line}")
        for function, arch, stack, spilled, registers in kernels(text):
            total += 1
            if "--table" in sys.argv:
                print(f"{log.stem}\t{arch}\t{registers} registers\t{stack} B stack\t"
                      f"{readable(function)}")
            if stack or spilled:
                bad += 1
                print(f"{log.stem}: {readable(function)} for {arch}: {stack} bytes of stack, "
                      f"{spilled} spilled")
    print(f"{total} kernels, {bad} in local memory or serialized")
    sys.exit(1 if bad or not total else 0)


if __name__ == "__main__":
    main()
