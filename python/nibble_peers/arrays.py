"""A worker for a library that Python can call with numpy arrays: all but the library itself."""

import time

import numpy as np

from .worker import PROTOCOL, Refusal, wake_threads


def pack_nibbles(values):
    """Pairs of 4-bit values along the last axis, the first in the low half; odd ends padded."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | (values[..., 1::2] << 4)


class AwqWeight:
    """codes (n, groups, group_size), zeros, scales (n, groups): as in the checkpoint, exactly."""

    def __init__(self, n, k, group_size, files):
        self.n, self.k, self.group_size, self.groups = n, k, group_size, k // group_size
        self.codes = np.fromfile(files["codes"], np.uint8).reshape(n, self.groups, group_size)
        self.zeros = np.fromfile(files["zeros"], np.uint8).reshape(n, self.groups)
        self.scales = np.fromfile(files["scales"], np.float32).reshape(n, self.groups)

    def values(self):
        centred = self.codes.astype(np.float32) - self.zeros[..., None]
        return (centred * self.scales[..., None]).reshape(self.n, self.k)

    def bits(self, scale_bits):
        """Bits a weight, with a scale of so many and a 4-bit zero point for each group."""
        return 4 + (scale_bits + 4) / self.group_size


class ArrayPeer:
    """What a subclass adds: about(), types() -> {name: bits a weight}, make(type) -> a callable
    that takes x (m, k) and returns y (m, n), with a copy of the weight of its own; wake()."""

    def hello(self, threads):
        self.start(threads)
        return {"protocol": PROTOCOL, "device": "cpu", **self.about()}

    def prepare(self, n, k, group_size, weights):
        self.copies, self.next, self.inputs, self.warmed = {}, 0, {}, {}
        self.weight = AwqWeight(n, k, group_size, weights)
        return {"types": [{"type": name, "bits_per_weight": bits}
                          for name, bits in self.types().items()]}

    def dequantize(self, type, path):
        self.weight.values().tofile(path)
        return {}

    def copies_of(self, type):
        if type not in self.copies:
            self.hold(type, 0)
        return self.copies[type]

    def hold(self, type, bytes):
        size = self.types()[type] * self.weight.n * self.weight.k / 8
        copies = self.copies.setdefault(type, [])
        while len(copies) < max(2, bytes / size):
            copies.append(self.make(type))
        return {"copies": len(copies)}

    def input(self, m, path):
        if m not in self.inputs:
            self.inputs[m] = np.fromfile(path, np.float32).reshape(m, self.weight.k)
        return self.inputs[m]

    def check(self, type, m, x, y):
        result = np.asarray(self.copies_of(type)[0](self.input(m, x)), dtype=np.float32)
        if result.shape != (m, self.weight.n):
            raise Refusal(f"y is of shape {result.shape}")
        np.ascontiguousarray(result).tofile(y)
        return {}

    def run(self, type, m, x, repetitions):
        copies, x = self.copies_of(type), self.input(m, x)
        for product in copies[self.warmed.get((type, m), 0):]:
            product(x)  # some libraries compile for a shape when they first meet it
        self.warmed[type, m] = len(copies)
        microseconds = []
        for _ in range(repetitions):
            self.next += 1
            product = copies[self.next % len(copies)]
            wake_threads(self.wake)
            start = time.perf_counter_ns()
            product(x)
            microseconds.append((time.perf_counter_ns() - start) / 1000)
        return {"us": microseconds}
