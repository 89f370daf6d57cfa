#!/usr/bin/env python3
"""Fail if w4a4_mma_sm80 does not multiply 4-bit operands by tensor cores that have them.

usage: check_int4_products.py CUOBJDUMP OBJECT

For 8.0, 8.6 and 8.9, the machine code of every kernel that is called w4a4_mma in OBJECT must have
instructions IMMA.16864 (m16n8k64 of 4 bits) and no other IMMA: that is how the compiler emulates
them for GPUs that have none. Exits with 77 (skipped) where there is no CUOBJDUMP."""

import re
import shutil
import subprocess
import sys

ARCHITECTURES = ("sm_80", "sm_86", "sm_89")
FUNCTION = re.compile(r"^\s*Function : (\S*w4a4_mma\S*)")
PRODUCT = re.compile(r"\bIMMA\.(\w+)")


def products(sass):
    """{kernel: {shape: how often}} of the disassembly of one architecture."""
    found, at = {}, None
    for line in sass.splitlines():
        if "Function :" in line:
            match = FUNCTION.search(line)
            at = found.setdefault(match[1], {}) if match else None
        elif at is not None and (match := PRODUCT.search(line)):
            at[match[1]] = at.get(match[1], 0) + 1
    return found


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    cuobjdump, target = sys.argv[1:]
    if not shutil.which(cuobjdump):
        print(f"{cuobjdump}: not there (python/requirements-cuda.txt has it)")
        sys.exit(77)
    bad = 0
    for arch in ARCHITECTURES:
        dump = subprocess.run([cuobjdump, "-sass", "-arch", arch, target],
                              capture_output=True, text=True, check=False)
        if dump.returncode != 0:
            sys.exit(f"{cuobjdump}: {dump.stderr.strip()}")
        kernels = products(dump.stdout)
        counts = [shapes.get("16864", 0) for shapes in kernels.values()]
        emulated = [name for name, shapes in kernels.items() if set(shapes) != {"16864"}]
        for name in emulated:
            print(f"{arch}: {name} multiplies by {kernels[name] or 'no tensor cores'}")
        bad += len(emulated) + (not kernels)
        print(f"{arch}: {len(kernels)} kernels, {sum(counts)} products of 4 bits")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
