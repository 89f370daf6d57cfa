"""AWQ tensors -> one uint8 tensor that torch.ops.nibble.linear multiplies with."""

from __future__ import annotations

import ctypes

import torch

from .. import _library as native
from .._library import check, lib
from .._shards import groups_met, shard_group_size, source_groups
from ..errors import InvalidArgument

__all__ = ["pack_awq", "shard_group_size"]

FLOATS = {torch.float32: native.F32, torch.float16: native.F16, torch.bfloat16: native.BF16}


def _expect(name: str, tensor, shape: tuple, dtypes: tuple) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(tensor).__name__}")
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InvalidArgument(f"{name}: expected {wanted} {list(shape)}, found "
                              f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    return tensor.contiguous()


def pack_awq(qweight: torch.Tensor, qzeros: torch.Tensor | None, scales: torch.Tensor,
             group_size: int, bias: torch.Tensor | None = None, k_offset: int = 0,
             full_group_size: int | None = None) -> torch.Tensor:
    """Packs one weight as it lies in an AWQ checkpoint of version "gemm".

    qweight int32 (K, N/8), qzeros int32 (G, N/8) or None (8 everywhere), scales float16 or bfloat16
    (G, N), bias float (N) or None. group_size -1: K. The tensors may lie anywhere; the result lies
    where qweight lies.

    A shard by rows of a larger weight (tensor parallelism) gives k_offset, the row of the whole
    weight where it begins, and all G groups that its rows lie in. Groups that straddle its ends are
    cut exactly; the result then has the group size shard_group_size(group_size, k_offset, K).
    full_group_size: that of the whole weight, if group_size is the shard's own.

    Returns uint8 (bytes). Raises InvalidArgument, naming the tensor.
    """
    if not isinstance(qweight, torch.Tensor) or qweight.dim() != 2:
        raise InvalidArgument("qweight: expected an int32 tensor (K, N/8)")
    device = qweight.device
    k, n = qweight.shape[0], qweight.shape[1] * 8
    group_size = k if group_size == -1 else int(group_size)
    if full_group_size is not None:
        if group_size != shard_group_size(int(full_group_size), k_offset, k):
            raise InvalidArgument(
                f"group_size: expected {shard_group_size(int(full_group_size), k_offset, k)} of "
                f"rows {k_offset} to {k_offset + k} in groups of {full_group_size}, found "
                f"{group_size}")
        group_size = int(full_group_size)
    shard = shard_group_size(group_size, k_offset, k)
    groups = groups_met(group_size, k_offset, k)
    qweight = _expect("qweight", qweight, (k, n // 8), (torch.int32,))
    scales = _expect("scales", scales, (groups, n), (torch.float16, torch.bfloat16))
    if qzeros is not None:
        qzeros = _expect("qzeros", qzeros, (groups, n // 8), (torch.int32,))
    if bias is not None:
        bias = _expect("bias", bias, (n,), tuple(FLOATS))
    rows = source_groups(group_size, k_offset, k)
    if rows is not None:
        index = torch.tensor(rows)
        scales = scales.index_select(0, index)
        qzeros = None if qzeros is None else qzeros.index_select(0, index)
    desc = native.WeightDesc(
        k=k, n=n, group_size=shard, layout=native.AWQ_GEMM, scale_dtype=FLOATS[scales.dtype],
        qweight=qweight.data_ptr(), qzeros=None if qzeros is None else qzeros.data_ptr(),
        scales=scales.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        bias_dtype=native.F32 if bias is None else FLOATS[bias.dtype])
    return _pack_on(device, desc)


def _pack_on(device: torch.device, desc: native.WeightDesc) -> torch.Tensor:
    size = ctypes.c_size_t()
    if device.type == "cpu":
        check(lib.nibble_weight_packed_bytes(size, desc), "pack_awq")
        packed = torch.empty(size.value, dtype=torch.uint8)
        check(lib.nibble_weight_pack(packed.data_ptr(), size.value, desc,
                                     torch.get_num_threads()), "pack_awq")
        return packed
    if device.type != "cuda":
        raise InvalidArgument(f"qweight: expected it on the CPU or a CUDA device, found {device}")
    check(lib.nibble_cuda_packed_bytes(size, desc), "pack_awq")
    packed = torch.empty(size.value, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)  # the memory may still be in use by work that was queued before
    check(lib.nibble_cuda_pack(packed.data_ptr(), size.value, desc, packed.device.index),
          "pack_awq")
    return packed
