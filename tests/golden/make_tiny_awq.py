#!/usr/bin/env python3
"""Writes tiny_awq.safetensors: one AWQ "gemm" layer, made without any code of this project.

Run from anywhere: python3 tests/golden/make_tiny_awq.py
K = 32, N = 16, group size 16. The values are formulas that tests/test_linear_format.cc repeats:
    q[k][n] = (7 k + 3 n + k n) mod 16        z[g][n] = (5 g + n) mod 16
    s[g][n] = (n + 1) (g + 1) / 64, float16   bias[n] = n - 8, float16
"""

import json
import pathlib
import struct

K, N, GROUP = 32, 16, 16
GROUPS = K // GROUP
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds column 8c + ORDER[i]


def pack(rows):
    """Rows of 4-bit values to little-endian int32 words in AWQ's nibble order."""
    out = b""
    for row in rows:
        for c in range(0, len(row), 8):
            word = sum(row[c + ORDER[i]] << (4 * i) for i in range(8))
            out += struct.pack("<I", word)
    return out


def main():
    q = [[(7 * k + 3 * n + k * n) % 16 for n in range(N)] for k in range(K)]
    z = [[(5 * g + n) % 16 for n in range(N)] for g in range(GROUPS)]
    s = [(n + 1) * (g + 1) / 64 for g in range(GROUPS) for n in range(N)]
    bias = [n - 8 for n in range(N)]
    prefix = "model.layers.0.self_attn.q_proj."
    tensors = [
        (prefix + "qweight", "I32", [K, N // 8], pack(q)),
        (prefix + "qzeros", "I32", [GROUPS, N // 8], pack(z)),
        (prefix + "scales", "F16", [GROUPS, N], struct.pack("<%de" % len(s), *s)),
        (prefix + "bias", "F16", [N], struct.pack("<%de" % N, *bias)),
    ]
    header, payload = {"__metadata__": {"format": "pt"}}, b""
    for name, dtype, shape, data in tensors:
        offsets = [len(payload), len(payload) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        payload += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = pathlib.Path(__file__).with_name("tiny_awq.safetensors")
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


if __name__ == "__main__":
    main()
