#!/usr/bin/env python3
"""A worker for the tests of `bench gemm --peers`: W in fp32, and one fault by name of this file.

    dies-in-run, dies-in-hold, hangs-in-run, garbage-in-run, wrong, refuses, refuses-in-colour,
    other-protocol, leaves-its-group; anything else works

A name with "on-cuda" in it: a worker that says that it is for a GPU, takes the tensors of a
checkpoint, and answers for the rows and columns that it is asked about; float16 scales.
"""

import array
import json
import os
import struct
import sys
import time

FAULT = os.path.basename(sys.argv[0])
ON_CUDA = "on-cuda" in FAULT
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def floats(path):
    values = array.array("f")
    with open(path, "rb") as file:
        values.frombytes(file.read())
    return values


def words(path, count):
    with open(path, "rb") as file:
        return struct.unpack(f"<{count}I", file.read())


def dequantize(n, k, group_size, checkpoint):
    """w (n, k): qweight (k, n / 8), qzeros (groups, n / 8), scales (groups, n)."""
    groups = k // group_size
    codes, zeros = words(checkpoint["qweight"], k * n // 8), words(checkpoint["qzeros"],
                                                                   groups * n // 8)
    with open(checkpoint["scales"], "rb") as file:
        scales = struct.unpack(f"<{groups * n}e", file.read())
    w = array.array("f")
    for column in range(n):
        shift = 4 * NIBBLE_OF_COLUMN[column % 8]
        for row in range(k):
            group = row // group_size
            code = codes[row * (n // 8) + column // 8] >> shift & 15
            zero = zeros[group * (n // 8) + column // 8] >> shift & 15
            w.append((code - zero) * scales[group * n + column])
    return w


def multiply(state, x, m):
    n, k, w = state["n"], state["k"], state["w"]
    y = array.array("f")
    for row in range(m):
        x_row = x[row * k:(row + 1) * k]
        for column in range(n):
            y.append(sum(map(float.__mul__, x_row, w[column * k:(column + 1) * k])))
    if FAULT.startswith("wrong"):
        y[0] += 1000
    return y


def answer(request, state):
    operation = request["op"]
    if operation == "hello":
        if FAULT == "leaves-its-group":
            os.setpgid(0, os.getpgid(os.getppid()))
        return {"protocol": 2 if FAULT == "other-protocol" else 1, "name": "fake", "version": "7",
                "library": "none", "threads": request["threads"],
                "device": "cuda" if ON_CUDA else "cpu"}
    if operation == "prepare" and ON_CUDA:
        n, k = request["n"], request["k"]
        w = dequantize(n, k, request["group_size"], request["checkpoint"])
        state.update(n=n, k=k, w=w)
        return {"types": [{"type": "f32", "bits_per_weight": 32, "activations": "16bit"}]}
    if operation == "prepare":
        state.update(n=request["n"], k=request["k"], w=floats(request["weights"]["values"]))
        return {"types": [{"type": "f32/plain", "bits_per_weight": 32},
                          {"type": "f32/again", "bits_per_weight": 32}]}
    if operation == "dequantize":
        if FAULT == "refuses":
            return {"error": "not today"}
        if FAULT == "refuses-in-colour":
            return {"error": "\x1b[31mno"}
        with open(request["path"], "wb") as file:
            file.write(state["w"].tobytes())
        return {}
    if operation == "check" and ON_CUDA:
        y, n = multiply(state, floats(request["x"]), request["m"]), state["n"]
        asked = array.array("f", (y[row * n + column] for row in request["rows"]
                                  for column in request["columns"]))
        with open(request["y"], "wb") as file:
            file.write(asked.tobytes())
        return {"candidate": "the only one"}
    if operation == "check":
        with open(request["y"], "wb") as file:
            file.write(multiply(state, floats(request["x"]), request["m"]).tobytes())
        return {}
    if operation == "hold":
        if FAULT == "dies-in-hold":
            os.kill(os.getpid(), 9)
        state["held"] = True
        return {"copies": 2}
    if FAULT == "dies-in-run" and "held" in state:
        os.kill(os.getpid(), 9)
    if FAULT == "hangs-in-run" and "held" in state:
        time.sleep(1000)
    if FAULT == "garbage-in-run" and "held" in state:
        return "segmentation fault, they say"
    return {"us": [123.0] * request["repetitions"]}


def main():
    state = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "bye":
            return
        reply = answer(request, state)
        print(reply if isinstance(reply, str) else json.dumps(reply), flush=True)


main()
