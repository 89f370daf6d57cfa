"""Random AWQ tensors for the tests of python/nibble, and what they mean, written independently of
the library (numpy only)."""

import numpy as np

ORDER = (0, 16, 4, 20, 8, 24, 12, 28)  # column j of eight lies in nibble 0 4 1 5 2 6 3 7


def pack(codes):
    """(rows, N) of 0..15 -> int32 (rows, N/8)."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for column, shift in enumerate(ORDER):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(shift)
    return words.view(np.int32)


class AwqTensors:
    """q, z, s of one weight (K, N) with groups, as numbers and as they lie in a file."""

    def __init__(self, k=256, n=72, group_size=64, seed=0, zeros=True, bias=False):
        random = np.random.default_rng(seed)
        groups = k // group_size
        self.k, self.n, self.group_size = k, n, group_size
        self.q = random.integers(0, 16, (k, n), np.uint8)
        self.z = random.integers(0, 16, (groups, n), np.uint8) if zeros \
            else np.full((groups, n), 8, np.uint8)
        self.scales = random.uniform(0.002, 0.02, (groups, n)).astype(np.float16)
        self.scales[0, 0] = -self.scales[0, 0]  # any sign is legal
        self.bias = random.standard_normal(n).astype(np.float32) if bias else None
        self.qweight, self.qzeros = pack(self.q), pack(self.z) if zeros else None

    def tensors(self):
        return self.qweight, self.qzeros, self.scales, self.group_size, self.bias

    def differences(self):
        """q - z as int64 (K, N)."""
        return self.q.astype(np.int64) - np.repeat(self.z, self.group_size, 0)

    def dense(self):
        """float64 (K, N)."""
        return self.differences() * np.repeat(self.scales.astype(np.float64), self.group_size, 0)

    def expected(self, x):
        y = x.astype(np.float64) @ self.dense()
        return y if self.bias is None else y + self.bias

    def quantized(self, codes, scales):
        """The product of quantized activations, in float64 on exact integer sums."""
        shape = (-1, self.k // self.group_size, self.group_size)
        sums = np.einsum("mgk,gkn->mgn", codes.reshape(shape).astype(np.int64),
                         self.differences().reshape(shape[1:] + (self.n,)))
        steps = scales.astype(np.float64)
        steps = steps[:, :, None] if steps.ndim == 2 else steps[:, None, None]
        y = (sums * steps * self.scales.astype(np.float64)).sum(1)
        return y if self.bias is None else y + self.bias
