"""torch.ops.nibble: what the library does, as operators that torch.compile and CUDA graphs keep
whole. Registered with Library.define and impl, the route with the least overhead per call.

  linear(x, packed, n, group_size, mode, granularity, symmetric, clip, static_scales, wide_groups)
      y = x W + bias. x (..., K) float32, float16 or bfloat16, its rows contiguous; y (..., n) like
      x. packed: see pack_awq. mode and granularity: values of nibble.Mode and nibble.Granularity.
      static_scales float32, (1) or (K / group_size); wide_groups uint8 (K / group_size).
  quantize(x, group_size, mode, granularity, ...) -> codes int8 (..., K), scales float32 (M) or
      (M, K / group_size): what linear does first.
  linear_quantized(codes, scales, packed, n, group_size, mode, granularity, dtype): the rest.

The kernel is chosen by the number of rows inside the operator, so that it may be symbolic. No rows
give no rows.
"""

from __future__ import annotations

import math

import torch

from .. import _calls
from .._calls import multiply
from ..errors import InvalidArgument
from . import cuda
from .packing import FLOATS

_threads = torch.get_num_threads
_PER_GROUP = (2, 4)  # Granularity.GROUP, STATIC_GROUP
_QUANTIZE_N = 32     # a plan needs some n; the quantizer does not depend on it

_library = torch.library.Library("nibble", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_HOW = "bool symmetric=True, float clip=1., Tensor? static_scales=None, Tensor? wide_groups=None"
_library.define(f"linear(Tensor x, Tensor packed, int n, int group_size, int mode, "
                f"int granularity, {_HOW}) -> Tensor", tags=_TAGS)
_library.define(f"quantize(Tensor x, int group_size, int mode, int granularity, {_HOW}) "
                "-> (Tensor, Tensor)", tags=_TAGS)
_library.define("linear_quantized(Tensor codes, Tensor scales, Tensor packed, int n, "
                "int group_size, int mode, int granularity, ScalarType dtype) -> Tensor",
                tags=_TAGS)


# ---- checks; the messages are made only when they are needed -------------------------------------

def _refuse(name: str, expected: str, found) -> InvalidArgument:
    return InvalidArgument(f"{name}: expected {expected}, found {found}")


def _describe(t: torch.Tensor) -> str:
    return (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} with strides "
            f"{list(t.stride())} on {t.device}")


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x as (M, K) and its dtype."""
    if x is None:  # how torch hands on an undefined tensor
        raise _refuse("x", "a tensor", None)
    dtype = FLOATS.get(x.dtype)
    if dtype is None or x.dim() == 0 or x.shape[-1] == 0 or x.stride()[-1] != 1:
        raise _refuse("x", "float32, float16 or bfloat16 (..., K), K > 0, with contiguous rows",
                      _describe(x))
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])), dtype


def _check_packed(packed: torch.Tensor) -> None:
    if packed is None:
        raise _refuse("packed", "a tensor", None)
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise _refuse("packed", "uint8 (bytes), contiguous", _describe(packed))


def _address(name: str, tensor: torch.Tensor | None, dtype: torch.dtype,
             count: int) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype is not dtype or tensor.numel() != count or not tensor.is_contiguous():
        raise _refuse(name, f"{str(dtype).removeprefix('torch.')} [{count}], contiguous",
                      _describe(tensor))
    return tensor.data_ptr()


def _parameters(k: int, group_size: int, granularity: int, static_scales, wide_groups):
    """Addresses of the two optional tensors. Refuses groups that do not divide K."""
    if group_size < 1 or k % group_size:
        raise _refuse("group_size", f"a divisor of K={k}", group_size)
    groups = k // group_size
    return (_address("static_scales", static_scales, torch.float32,
                     groups if granularity == 4 else 1),
            _address("wide_groups", wide_groups, torch.uint8, groups))


def _scales_shape(m: int, k: int, group_size: int, granularity: int) -> tuple[int, ...]:
    return (m, k // group_size) if granularity in _PER_GROUP else (m,)


# ---- CPU -----------------------------------------------------------------------------------------

def _linear_cpu(x, packed, n, group_size, mode, granularity, symmetric=True, clip=1.0,
                static_scales=None, wide_groups=None):
    rows, dtype = _rows(x)
    m, k = rows.shape
    _check_packed(packed)
    if group_size == -1:
        group_size = k
    static = wide = None
    if static_scales is not None or wide_groups is not None:
        static, wide = _parameters(k, group_size, granularity, static_scales, wide_groups)
    if n < 1:
        raise _refuse("n", "a positive number", n)
    y = x.new_empty((*x.shape[:-1], n))
    multiply((m, n, k, group_size, mode, dtype, dtype, granularity, not symmetric, _threads()),
             rows.data_ptr(), rows.stride()[0] if m > 1 else k, clip, static, wide,
             packed.data_ptr(), packed.numel(), y.data_ptr(), n)
    return y


def _quantize_cpu(x, group_size, mode, granularity, symmetric=True, clip=1.0, static_scales=None,
                  wide_groups=None):
    rows, dtype = _rows(x)
    m, k = rows.shape
    group_size = k if group_size == -1 else group_size
    static, wide = _parameters(k, group_size, granularity, static_scales, wide_groups)
    key = (m, _QUANTIZE_N, k, group_size, mode, dtype, dtype, granularity, 0 if symmetric else 1,
           _threads())
    _calls.plan(key)  # refuses what follows could not be sized for
    codes = torch.empty((m, k), dtype=torch.int8)
    scales = torch.empty(_scales_shape(m, k, group_size, granularity), dtype=torch.float32)
    _calls.quantize(key, rows.data_ptr(), rows.stride(0) if m > 1 else k, clip, static, wide,
                    codes.data_ptr(), scales.data_ptr())
    return codes.view(x.shape), scales


def _check_codes(codes, scales, packed, n, group_size, granularity, dtype) -> tuple[int, int, int]:
    """M, K and the group size."""
    for name, tensor in (("codes", codes), ("scales", scales)):
        if tensor is None:
            raise _refuse(name, "a tensor", None)
    if codes.dtype is not torch.int8 or codes.dim() == 0 or not codes.is_contiguous() \
            or codes.shape[-1] == 0:
        raise _refuse("codes", "int8 (..., K), contiguous", _describe(codes))
    if dtype not in FLOATS:
        raise _refuse("dtype", "float32, float16 or bfloat16", dtype)
    k = codes.shape[-1]
    m = codes.numel() // k
    group_size = k if group_size == -1 else group_size
    if group_size < 1 or k % group_size:
        raise _refuse("group_size", f"a divisor of K={k}", group_size)
    if n < 1:
        raise _refuse("n", "a positive number", n)
    _address("scales", scales, torch.float32, math.prod(_scales_shape(m, k, group_size,
                                                                      granularity)))
    _check_packed(packed)
    return m, k, group_size


def _linear_quantized_cpu(codes, scales, packed, n, group_size, mode, granularity, dtype):
    m, k, group_size = _check_codes(codes, scales, packed, n, group_size, granularity, dtype)
    y = torch.empty((*codes.shape[:-1], n), dtype=dtype)
    _calls.multiply_quantized((m, n, k, group_size, mode, FLOATS[dtype], FLOATS[dtype],
                               granularity, 0, _threads()),
                              codes.data_ptr(), k, scales.data_ptr(), packed.data_ptr(),
                              packed.numel(), y.data_ptr(), n)
    return y


# ---- CUDA ----------------------------------------------------------------------------------------

def _on(device: torch.device, **tensors) -> None:
    """The operator runs where one of its tensors is on a GPU: all of them must be on that one."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise _refuse(name, f"it on {device}", tensor.device)


def _linear_cuda(x, packed, n, group_size, mode, granularity, symmetric=True, clip=1.0,
                 static_scales=None, wide_groups=None):
    rows, dtype = _rows(x)
    m, k = rows.shape
    _check_packed(packed)
    if packed.device != x.device:
        raise _refuse("packed", f"it on {x.device}", packed.device)
    if group_size == -1:
        group_size = k
    static = None
    if static_scales is not None or wide_groups is not None:
        _on(x.device, static_scales=static_scales, wide_groups=wide_groups)
        static, _ = _parameters(k, group_size, granularity, static_scales, wide_groups)
    if n < 1:
        raise _refuse("n", "a positive number", n)
    y = x.new_empty((*x.shape[:-1], n))
    if m > 0:
        cuda.multiply((m, n, k, group_size, mode, dtype, dtype, granularity, not symmetric, 0),
                      x.device, rows.data_ptr(), rows.stride()[0] if m > 1 else k, clip,
                      static, packed.data_ptr(), packed.numel(), y.data_ptr(), n)
    return y


def _quantize_cuda(x, group_size, mode, granularity, symmetric=True, clip=1.0, static_scales=None,
                   wide_groups=None):
    rows, dtype = _rows(x)
    m, k = rows.shape
    group_size = k if group_size == -1 else group_size
    _on(x.device, static_scales=static_scales, wide_groups=wide_groups)
    static, _ = _parameters(k, group_size, granularity, static_scales, wide_groups)
    key = (m, _QUANTIZE_N, k, group_size, mode, dtype, dtype, granularity, not symmetric, 0)
    operand = cuda.Operand(key, x.device, _scales_shape(m, k, group_size, granularity))
    if m > 0:
        operand.quantize(rows.data_ptr(), rows.stride(0) if m > 1 else k, clip, static)
    return operand.codes[:, :k].contiguous().view(x.shape), operand.scales


def _linear_quantized_cuda(codes, scales, packed, n, group_size, mode, granularity, dtype):
    m, k, group_size = _check_codes(codes, scales, packed, n, group_size, granularity, dtype)
    _on(codes.device, scales=scales, packed=packed)
    key = (m, n, k, group_size, mode, FLOATS[dtype], FLOATS[dtype], granularity, 0, 0)
    operand = cuda.Operand(key, codes.device, _scales_shape(m, k, group_size, granularity))
    y = torch.empty((*codes.shape[:-1], n), dtype=dtype, device=codes.device)
    if m > 0:
        operand.codes[:, :k] = codes.view(m, k)
        operand.codes[:, k:] = 0
        operand.scales.copy_(scales.view(operand.scales.shape))
        operand.multiply(packed.data_ptr(), packed.numel(), y.data_ptr(), n)
    return y


# ---- shapes, for tracing -------------------------------------------------------------------------

def _linear_fake(x, packed, n, group_size, mode, granularity, symmetric=True, clip=1.0,
                 static_scales=None, wide_groups=None):
    return x.new_empty((*x.shape[:-1], n))


def _quantize_fake(x, group_size, mode, granularity, symmetric=True, clip=1.0, static_scales=None,
                   wide_groups=None):
    k = x.shape[-1]
    m = 1
    for size in x.shape[:-1]:
        m = m * size
    groups = 1 if group_size == -1 else k // group_size
    shape = (m, groups) if granularity in _PER_GROUP else (m,)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32)


def _linear_quantized_fake(codes, scales, packed, n, group_size, mode, granularity, dtype):
    return codes.new_empty((*codes.shape[:-1], n), dtype=dtype)


for _name, _cpu, _cuda, _fake in (
        ("linear", _linear_cpu, _linear_cuda, _linear_fake),
        ("quantize", _quantize_cpu, _quantize_cuda, _quantize_fake),
        ("linear_quantized", _linear_quantized_cpu, _linear_quantized_cuda,
         _linear_quantized_fake)):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"nibble::{_name}", _fake, lib=_library)
