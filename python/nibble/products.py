"""Weights and products on arrays in memory of the CPU: what `import nibble` offers."""

from __future__ import annotations

import ctypes

import numpy as np

from . import _calls
from . import _library as native
from ._library import check, lib
from ._shards import groups_met, shard_group_size, source_groups
from .arrays import Array, require, view
from .errors import InvalidArgument
from .modes import Granularity, Mode, Spec, make_spec

FLOATS = {"float32": native.F32, "float16": native.F16, "bfloat16": native.BF16}
_PER_GROUP = (Granularity.GROUP, Granularity.STATIC_GROUP)
_QUANTIZE_N = 32  # a plan needs some n; the quantizer does not depend on it


class Weight:
    """A packed weight (K, N) with groups of group_size. Immutable; threads may share it."""

    def __init__(self, memory: np.ndarray) -> None:
        """memory: uint8, 64-byte aligned, as Weight.memory of another one, copied or from a file.
        Kept, not copied."""
        array = require("memory", view("memory", memory), ("uint8",))
        handle = ctypes.c_void_p()
        check(lib.nibble_weight_open(handle, array.address, memory.nbytes), "memory")
        self.memory = memory
        self.k: int = lib.nibble_weight_k(handle)
        self.n: int = lib.nibble_weight_n(handle)
        self.group_size: int = lib.nibble_weight_group_size(handle)

    def __repr__(self) -> str:
        return f"nibble.Weight(k={self.k}, n={self.n}, group_size={self.group_size})"


def aligned_bytes(count: int) -> np.ndarray:
    """Uninitialised uint8 memory that begins at a multiple of 64 bytes."""
    memory = np.empty(count + 63, np.uint8)
    skip = -memory.ctypes.data % 64
    return memory[skip:skip + count]


def _describe(qweight, qzeros, scales, group_size: int, bias, k_offset: int):
    """nibble_weight_desc of the tensors, and what has to stay alive with it."""
    words = view("qweight", qweight)
    if len(words.shape) != 2:
        raise InvalidArgument(f"qweight: expected int32 (K, N/8), found {words}")
    require("qweight", words, ("int32", "uint32"))
    k, n = words.shape[0], words.shape[1] * 8
    group_size = k if group_size == -1 else group_size
    shard = shard_group_size(group_size, k_offset, k)
    groups = groups_met(group_size, k_offset, k)
    steps = require("scales", view("scales", scales), ("float16", "bfloat16"), (groups, n))
    zeros = None
    if qzeros is not None:
        zeros = require("qzeros", view("qzeros", qzeros), ("int32", "uint32"), (groups, n // 8))
    added = None
    if bias is not None:
        added = require("bias", view("bias", bias), tuple(FLOATS), (n,))
    rows = source_groups(group_size, k_offset, k)
    kind = FLOATS[steps.dtype]
    if rows is not None:
        steps = _rows_of(steps, rows, np.uint16)
        zeros = None if zeros is None else _rows_of(zeros, rows, np.uint32)
    desc = native.WeightDesc(
        k=k, n=n, group_size=shard, layout=native.AWQ_GEMM, scale_dtype=kind,
        qweight=words.address, qzeros=zeros and zeros.address, scales=steps.address,
        bias=added and added.address, bias_dtype=FLOATS[added.dtype] if added else native.F32)
    return desc, (words, zeros, steps, added)


def _rows_of(array: Array, rows: list[int], dtype) -> Array:
    """A copy of some rows, as bits."""
    count, width = array.shape
    kind = ctypes.c_uint8 * (count * width * np.dtype(dtype).itemsize)
    bits = np.frombuffer(kind.from_address(array.address), dtype).reshape(count, width)
    return view("rows", np.ascontiguousarray(bits[rows]))


def pack_awq(qweight, qzeros, scales, group_size: int, bias=None, k_offset: int = 0,
             threads: int = 0) -> Weight:
    """Packs one weight as it lies in an AWQ checkpoint of version "gemm".

    qweight int32 (K, N/8), qzeros int32 (G, N/8) or None (8 everywhere), scales float16 or bfloat16
    (G, N), bias float (N) or None; all contiguous. group_size -1: K. k_offset: rows of a larger
    weight, see nibble.torch.pack_awq. threads 0: all CPUs.
    """
    desc, kept = _describe(qweight, qzeros, scales, group_size, bias, k_offset)
    size = ctypes.c_size_t()
    check(lib.nibble_weight_packed_bytes(size, desc))
    memory = aligned_bytes(size.value)
    check(lib.nibble_weight_pack(memory.ctypes.data, size.value, desc, threads))
    del kept
    return Weight(memory)


def dequantize(qweight, qzeros, scales, group_size: int) -> np.ndarray:
    """(q - z) * s, exactly: float32 (K, N). The tensors as in pack_awq."""
    desc, kept = _describe(qweight, qzeros, scales, group_size, None, 0)
    out = np.empty((desc.k, desc.n), np.float32)
    check(lib.nibble_dequantize(desc, out.ctypes.data))
    del kept
    return out


def _input(x) -> tuple[Array, int, int, int]:
    """x, its rows, its K, and the elements between rows."""
    array = view("x", x)
    if array.dtype not in FLOATS or not array.shape or array.shape[-1] == 0 \
            or not array.rows_contiguous:
        raise InvalidArgument("x: expected float32, float16 or bfloat16 (..., K), K > 0, with "
                              f"contiguous rows, found {array}")
    k = array.shape[-1]
    if len(array.shape) == 2:
        m = array.shape[0]
        return array, m, k, array.strides[0] if m > 1 else k
    if not array.contiguous:
        raise InvalidArgument(f"x: expected (M, K), or contiguous, found {array}")
    m = 1
    for size in array.shape[:-1]:
        m *= size
    return array, m, k, k


def _arrays(spec: Spec, groups: int) -> tuple:
    """The spec's static scales and wide groups as arrays, or None."""
    static = wide = None
    if spec.static_scales:
        wanted = groups if spec.granularity == Granularity.STATIC_GROUP else 1
        if len(spec.static_scales) != wanted:
            raise InvalidArgument(f"static_scales: expected {wanted}, found "
                                  f"{len(spec.static_scales)}")
        static = np.array(spec.static_scales, np.float32)
    if spec.product_mode == Mode.W4A4_WIDE:
        if len(spec.wide_groups) != groups:
            raise InvalidArgument(f"wide_groups: expected {groups} flags, found "
                                  f"{len(spec.wide_groups)}")
        wide = np.array(spec.wide_groups, np.uint8)
    return static, wide


def _at(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _output(out, shape: tuple, default: str) -> tuple[object, Array]:
    if out is None:
        if default == "bfloat16":
            raise InvalidArgument("out: expected an array of bfloat16 to write to: numpy has none")
        out = np.empty(shape, default)
    array = require("out", view("out", out), tuple(FLOATS), shape)
    if not array.writable:
        raise InvalidArgument("out: expected an array that may be written")
    return out, array


def linear(x, weight: Weight, mode: str | Spec = "w4a8", *, out=None, kernel: str | None = None,
           threads: int = 0, **options):
    """y = x W (+ bias): x (..., K) float32, float16 or bfloat16; y (..., N).

    mode and options: see make_spec. out: where y goes, of any of the three types; by default a new
    numpy array of x's type (bfloat16: `out` is needed). kernel: a name of nibble.kernels().
    """
    if not isinstance(weight, Weight):
        raise TypeError(f"weight: expected a nibble.Weight, found {type(weight).__name__}")
    spec = make_spec(mode, **options)
    array, m, k, stride = _input(x)
    if k != weight.k:
        raise InvalidArgument(f"x: expected (..., {weight.k}), found {array}")
    static, wide = _arrays(spec, k // weight.group_size)
    y, target = _output(out, (*array.shape[:-1], weight.n), array.dtype)
    key = (m, weight.n, k, weight.group_size, int(spec.product_mode), FLOATS[array.dtype],
           FLOATS[target.dtype], int(spec.granularity), int(not spec.symmetric), threads)
    _calls.multiply(key, array.address, stride, spec.clip, _at(static), _at(wide),
                    weight.memory.ctypes.data, weight.memory.nbytes, target.address, weight.n,
                    kernel)
    return y


def quantize(x, group_size: int, mode: str | Spec = "w4a8", *, threads: int = 0, **options):
    """The activations of linear alone: (codes int8 like x, scales float32 (M) or, per group,
    (M, K / group_size), sums int32 (M, K / group_size) of the codes)."""
    spec = make_spec(mode, **options)
    array, m, k, stride = _input(x)
    group_size = k if group_size == -1 else group_size
    if group_size < 1 or k % group_size:
        raise InvalidArgument(f"group_size: expected a divisor of K={k}, found {group_size}")
    groups = k // group_size
    static, wide = _arrays(spec, groups)
    kind = FLOATS[array.dtype]
    codes = np.empty(array.shape, np.int8)
    scales = np.empty((m, groups) if spec.granularity in _PER_GROUP else (m,), np.float32)
    sums = np.empty((m, groups), np.int32)
    key = (m, _QUANTIZE_N, k, group_size, int(spec.product_mode), kind, kind,
           int(spec.granularity), int(not spec.symmetric), threads)
    _calls.quantize(key, array.address, stride, spec.clip, _at(static), _at(wide),
                    codes.ctypes.data, scales.ctypes.data, sums.ctypes.data)
    return codes, scales, sums
