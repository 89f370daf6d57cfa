"""The calls that are made often, on raw addresses: what nibble.linear and the torch ops share.
Plans and workspaces are kept, so that a call after the first of its kind allocates nothing here.
Whoever calls keeps the memory behind every address alive and has checked its size."""

from __future__ import annotations

import ctypes
import threading

from ._library import Input, Plan, Problem, Target, check, lib

_MAX_PLANS = 4096  # of 256 bytes; one for each number of rows that is met

_plans: dict[tuple, tuple[int, int, Plan]] = {}


class _Thread(threading.local):
    """Of each thread: its workspace and the struct that its calls fill."""

    def __init__(self) -> None:
        self.input = Input()
        self.input_address = ctypes.addressof(self.input)
        self.buffer = None
        self.bytes = 0
        self.address = 0

    def grow(self, wanted: int) -> None:
        self.bytes = max(wanted, 2 * self.bytes)
        self.buffer = ctypes.create_string_buffer(self.bytes + 63)
        self.address = (ctypes.addressof(self.buffer) + 63) & ~63


_thread = _Thread()


def plan(key: tuple, kernel: str | None = None) -> tuple[int, int, Plan]:
    """(address, workspace bytes, the plan) of (m, n, k, group_size, mode, x dtype, y dtype,
    granularity, asymmetric, threads): the fields of nibble_problem in its order."""
    made = Plan()
    check(lib.nibble_gemm_plan(made, Problem(*key), kernel.encode() if kernel else None))
    entry = (ctypes.addressof(made), lib.nibble_gemm_workspace_bytes(made), made)
    if kernel is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = entry
    return entry


def multiply(key: tuple, x: int, x_stride: int, clip: float, static_scales: int | None,
             wide_groups: int | None, packed: int, packed_bytes: int, y: int, y_stride: int,
             kernel: str | None = None) -> None:
    """nibble_gemm_packed; key: see plan()."""
    entry = (_plans.get(key) if kernel is None else None) or plan(key, kernel)
    thread = _thread
    if thread.bytes < entry[1]:
        thread.grow(entry[1])
    given = thread.input
    given.x = x
    given.x_stride = x_stride
    given.clip = clip
    given.static_scales = static_scales
    given.wide_groups = wide_groups
    status = lib.nibble_gemm_packed(entry[0], thread.input_address, packed, packed_bytes, y,
                                    y_stride, thread.address)
    if status.code:
        check(status)


def multiply_quantized(key: tuple, codes: int, code_stride: int, scales: int, packed: int,
                       packed_bytes: int, y: int, y_stride: int) -> None:
    """nibble_gemm_quantized with one weight."""
    entry = _plans.get(key) or plan(key)
    weight = ctypes.c_void_p()
    check(lib.nibble_weight_open(weight, packed, packed_bytes))
    if lib.nibble_weight_n(weight) != key[1]:
        from .errors import InvalidArgument
        raise InvalidArgument(f"packed: expected a weight of N={key[1]}, found "
                              f"N={lib.nibble_weight_n(weight)}")
    if _thread.bytes < entry[1]:
        _thread.grow(entry[1])
    check(lib.nibble_gemm_quantized(entry[0], codes, code_stride, scales,
                                    Target(weight, y, y_stride), 1, _thread.address))


def quantize(key: tuple, x: int, x_stride: int, clip: float, static_scales: int | None,
             wide_groups: int | None, codes: int, scales: int, sums: int | None = None) -> None:
    """nibble_quantize_activations; the n of the key does not matter."""
    entry = _plans.get(key) or plan(key)
    given = Input(x, x_stride, clip, 0, static_scales, wide_groups)
    check(lib.nibble_quantize_activations(entry[0], ctypes.addressof(given), codes, scales, sums))
