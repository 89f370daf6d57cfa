"""Calls of the CUDA functions of the C ABI on torch's memory and current stream.

Nothing here waits, and nothing is kept but plans. A workspace comes from torch's allocator for
each product, so that streams, CUDA graphs and the pools of torch.compile need no care: torch hands
memory on in the order of the stream, and a graph's own within it. Only kernels that split K read
what is in it, and have its flags zeroed.
"""

from __future__ import annotations

import ctypes

import torch

from .._library import CudaOperand, CudaPlan, Input, Problem, check, lib

_MAX_PLANS = 4096
_NATURAL = b"w4a8_mma_sm80"  # the kernel whose codes lie in their natural order
_SLAB = 512                  # K of an operand is padded to it

_plans: dict[tuple, tuple[int, int, int, CudaPlan]] = {}

try:
    _raw_stream = torch._C._cuda_getCurrentRawStream
except AttributeError:  # a torch without CUDA
    def _raw_stream(device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream


def plan(key: tuple, device: int, kernel: bytes | None = None) -> tuple[int, int, int, CudaPlan]:
    """(address, workspace bytes, how many of them are zeroed, the plan); key: the fields of
    nibble_problem in its order."""
    at = (key, device, kernel)
    entry = _plans.get(at)
    if entry is None:
        made = CudaPlan()
        check(lib.nibble_cuda_gemm_plan(made, Problem(*key), device, kernel))
        entry = (ctypes.addressof(made), lib.nibble_cuda_workspace_bytes(made),
                 lib.nibble_cuda_zeroed_bytes(made), made)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[at] = entry
    return entry


def _workspace(entry: tuple, device: torch.device) -> torch.Tensor:
    made = torch.empty(entry[1], dtype=torch.uint8, device=device)
    if entry[2]:
        made[:entry[2]].zero_()
    return made


def multiply(key: tuple, device: torch.device, x: int, x_stride: int, clip: float,
             static_scales: int | None, packed: int, packed_bytes: int, y: int,
             y_stride: int) -> None:
    """nibble_cuda_gemm_packed on the current stream."""
    entry = plan(key, device.index)
    given = Input(x, x_stride, clip, 0, static_scales, None)
    workspace = _workspace(entry, device)
    status = lib.nibble_cuda_gemm_packed(entry[0], ctypes.addressof(given), packed, packed_bytes,
                                         y, y_stride, workspace.data_ptr(),
                                         _raw_stream(device.index))
    if status.code:
        check(status)


class Operand:
    """Quantized activations in the natural order of codes, and the two halves of a product."""

    def __init__(self, key: tuple, device: torch.device, scales_shape: tuple[int, ...]) -> None:
        m, k, group_size = key[0], key[2], key[3]
        self.device = device
        self.entry = plan(key, device.index, _NATURAL)
        depth = -(-k // _SLAB) * _SLAB
        promoted = group_size if group_size in (32, 64) else 128
        self.codes = torch.empty((m, depth), dtype=torch.int8, device=device)
        self.scales = torch.empty(scales_shape, dtype=torch.float32, device=device)
        self.sums = torch.empty((m, depth // promoted), dtype=torch.int32, device=device)
        self.range = torch.empty(4, dtype=torch.int32, device=device)
        self.struct = CudaOperand(self.codes.data_ptr(), self.scales.data_ptr(),
                                  self.sums.data_ptr(), self.range.data_ptr())

    def quantize(self, x: int, x_stride: int, clip: float, static_scales: int | None) -> None:
        given = Input(x, x_stride, clip, 0, static_scales, None)
        check(lib.nibble_cuda_quantize_activations(
            self.entry[0], ctypes.addressof(given), self.struct, _raw_stream(self.device.index)))

    def multiply(self, packed: int, packed_bytes: int, y: int, y_stride: int) -> None:
        workspace = _workspace(self.entry, self.device)
        check(lib.nibble_cuda_gemm_quantized(
            self.entry[0], self.struct, packed, packed_bytes, y, y_stride, workspace.data_ptr(),
            _raw_stream(self.device.index)))
