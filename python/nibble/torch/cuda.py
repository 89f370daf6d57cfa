"""Calls of the CUDA functions of the C ABI on torch's memory and current stream: plans and workspaces.
Nothing here waits; all of it may be captured into a CUDA graph."""

from __future__ import annotations

import ctypes

import torch

from .. import _library as native
from .._library import CudaOperand, CudaPlan, Input, Problem, check, lib

_MAX_PLANS = 4096
_NATURAL = b"w4a8_mma_sm80"  # the kernel whose codes lie in their natural order
_SLAB = 512                  # K of an operand is padded to it

_plans: dict[tuple, tuple[int, int, CudaPlan]] = {}
_workspaces: dict[tuple[int, int], torch.Tensor] = {}    # (device, stream)
_captured: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}  # with the id of the capture

try:
    _raw_stream = torch._C._cuda_getCurrentRawStream
except AttributeError:  # a torch without CUDA
    def _raw_stream(device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream


def plan(key: tuple, device: int, kernel: bytes | None = None) -> tuple[int, int, CudaPlan]:
    """(address, workspace bytes, the plan); key: the fields of nibble_problem in its order."""
    at = (key, device, kernel)
    entry = _plans.get(at)
    if entry is None:
        made = CudaPlan()
        check(lib.nibble_cuda_gemm_plan(made, Problem(*key), device, kernel))
        entry = (ctypes.addressof(made), lib.nibble_cuda_workspace_bytes(made), made)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[at] = entry
    return entry


def _zeroed(size: int, device: int) -> torch.Tensor:
    made = torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
    made[:native.CUDA_FLAG_BYTES].zero_()
    return made


def workspace(size: int, device: int, stream: int) -> int:
    """Address of at least `size` bytes for work on `stream`. One for each stream; one for each
    stream of each graph that is captured, in the memory of that graph, whose flags it zeroes when
    it is replayed."""
    size = max(size, native.CUDA_FLAG_BYTES)
    at = (device, stream)
    if torch.cuda.is_current_stream_capturing():
        capture = ctypes.c_uint64()
        check(lib.nibble_cuda_capture_id(capture, stream))
        known = _captured.get(at)
        if known is None or known[0] != capture.value or known[1].numel() < size:
            known = _captured[at] = (capture.value, _zeroed(size, device))
        return known[1].data_ptr()
    held = _workspaces.get(at)
    if held is None or held.numel() < size:
        # the one before is freed in the order of the stream, after the work that uses it
        held = _workspaces[at] = _zeroed(size, device)
    return held.data_ptr()


def multiply(key: tuple, device: int, x: int, x_stride: int, clip: float,
             static_scales: int | None, packed: int, packed_bytes: int, y: int,
             y_stride: int) -> None:
    """nibble_cuda_gemm_packed on the current stream."""
    entry = plan(key, device)
    stream = _raw_stream(device)
    given = Input(x, x_stride, clip, 0, static_scales, None)
    status = lib.nibble_cuda_gemm_packed(entry[0], ctypes.addressof(given), packed, packed_bytes,
                                         y, y_stride, workspace(entry[1], device, stream), stream)
    if status.code:
        check(status)


class Operand:
    """Quantized activations in the natural order of codes, and the two halves of a product."""

    def __init__(self, key: tuple, device: torch.device, scales_shape: tuple[int, ...]) -> None:
        m, k, group_size = key[0], key[2], key[3]
        self.device = device.index
        self.entry = plan(key, self.device, _NATURAL)
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
        check(lib.nibble_cuda_quantize_activations(self.entry[0], ctypes.addressof(given),
                                                   self.struct, _raw_stream(self.device)))

    def multiply(self, packed: int, packed_bytes: int, y: int, y_stride: int) -> None:
        stream = _raw_stream(self.device)
        check(lib.nibble_cuda_gemm_quantized(
            self.entry[0], self.struct, packed, packed_bytes, y, y_stride,
            workspace(self.entry[1], self.device, stream), stream))
