#!/usr/bin/env python3
"""One AWQ weight times some rows, with numpy alone: python examples/numpy_min.py"""

import numpy as np

import nibble

K, N, GROUP = 256, 64, 64
random = np.random.default_rng(1)

# As in an AWQ checkpoint of version "gemm": eight 4-bit codes in a word, scales for each group.
qweight = random.integers(-2**31, 2**31, (K, N // 8), np.int32)
qzeros = random.integers(-2**31, 2**31, (K // GROUP, N // 8), np.int32)
scales = random.uniform(0.002, 0.02, (K // GROUP, N)).astype(np.float16)

weight = nibble.pack_awq(qweight, qzeros, scales, GROUP)
x = random.standard_normal((8, K), np.float32)
exact = x.astype(np.float64) @ nibble.dequantize(qweight, qzeros, scales, GROUP)

for mode, most in (("w4a16", 1e-6), ("w4a8", 0.01), ("w4a4", 0.2)):
    y = nibble.linear(x, weight, mode)
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    print(f"{mode}: relative error {error:.1e}")
    assert error < most

try:
    nibble.linear(x[:, :-1], weight)
except nibble.InvalidArgument as refusal:
    print("refused:", refusal)
