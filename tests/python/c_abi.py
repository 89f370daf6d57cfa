"""One product by the plain C ABI (nibble_weight_create, nibble_gemm_plan, nibble_gemm) on torch
tensors: what the hosts' layers are compared with, by a route that shares none of their code."""

import ctypes

import torch

from nibble import _library as native
from nibble.modes import Granularity, Spec

DTYPES = {torch.float32: native.F32, torch.float16: native.F16, torch.bfloat16: native.BF16}


def product(x, qweight, qzeros, scales, group_size, bias, spec: Spec):
    """y (M, N) of x's dtype on one thread. The tensors of one AWQ weight; bias may be None."""
    library = native.lib
    for name in ("nibble_weight_create", "nibble_gemm"):
        getattr(library, name).restype = native.Status
    library.nibble_weight_destroy.restype = None
    m, k = x.shape
    n = scales.shape[1]
    tensors = [t if t is None else t.contiguous() for t in (x, qweight, qzeros, scales, bias)]
    x, qweight, qzeros, scales, bias = tensors
    desc = native.WeightDesc(
        k=k, n=n, group_size=group_size, layout=native.AWQ_GEMM, scale_dtype=DTYPES[scales.dtype],
        qweight=qweight.data_ptr(), qzeros=qzeros.data_ptr(), scales=scales.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        bias_dtype=native.F32 if bias is None else DTYPES[bias.dtype])
    weight = ctypes.c_void_p()
    native.check(library.nibble_weight_create(ctypes.byref(weight), ctypes.byref(desc), 1))
    dtype = DTYPES[x.dtype]
    problem = native.Problem(m, n, k, group_size, int(spec.product_mode), dtype, dtype,
                             int(spec.granularity), 0 if spec.symmetric else 1, 1)
    plan = native.Plan()
    native.check(library.nibble_gemm_plan(plan, problem, None))
    workspace = torch.empty(library.nibble_gemm_workspace_bytes(plan) + 64, dtype=torch.uint8)
    y = torch.empty((m, n), dtype=x.dtype)
    static = (ctypes.c_float * len(spec.static_scales))(*spec.static_scales)
    wide = (ctypes.c_uint8 * len(spec.wide_groups))(*spec.wide_groups)
    given = native.Input(x.data_ptr(), k, spec.clip, 0, ctypes.addressof(static),
                         ctypes.addressof(wide))
    target = native.Target(weight, y.data_ptr(), n)
    at = ctypes.c_void_p((workspace.data_ptr() + 63) & ~63)
    native.check(library.nibble_gemm(ctypes.byref(plan), ctypes.byref(given), ctypes.byref(target),
                                     1, at))
    library.nibble_weight_destroy(weight)
    return y
