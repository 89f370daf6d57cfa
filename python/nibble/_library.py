"""libnibble.so through ctypes: where it is, the structs and functions of include/nibble.h, and
statuses as exceptions. Nothing here knows numpy or torch."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char, c_char_p, c_float, c_int32, c_int64, c_size_t
from ctypes import c_uint64, c_void_p
from pathlib import Path

from .errors import BY_CODE, LibraryNotFound, NibbleError

ABI_VERSION = 1
NATIVE = Path(__file__).resolve().parent / "_native"  # where the wheel keeps what is compiled

F32, F16, BF16 = 0, 1, 2  # nibble_dtype
AWQ_GEMM = 0              # nibble_layout


class Status(Structure):
    _fields_ = [("code", c_int32), ("message", c_char * 508)]


class WeightDesc(Structure):
    _fields_ = [("k", c_int64), ("n", c_int64), ("group_size", c_int64), ("layout", c_int32),
                ("scale_dtype", c_int32), ("qweight", c_void_p), ("qzeros", c_void_p),
                ("scales", c_void_p), ("zero_words", c_int64), ("bias", c_void_p),
                ("bias_dtype", c_int32), ("reserved", c_int32)]


class Problem(Structure):
    _fields_ = [("m", c_int64), ("n", c_int64), ("k", c_int64), ("group_size", c_int64),
                ("mode", c_int32), ("x_dtype", c_int32), ("y_dtype", c_int32),
                ("granularity", c_int32), ("asymmetric", c_int32), ("threads", c_int32)]


class Plan(Structure):
    _fields_ = [("opaque", c_uint64 * 32)]


class Input(Structure):
    _fields_ = [("x", c_void_p), ("x_stride", c_int64), ("clip", c_float), ("reserved", c_int32),
                ("static_scales", c_void_p), ("wide_groups", c_void_p)]


class Target(Structure):
    _fields_ = [("weight", c_void_p), ("y", c_void_p), ("y_stride", c_int64)]


class CudaPlan(Structure):
    _fields_ = [("opaque", c_uint64 * 64)]


class CudaOperand(Structure):
    _fields_ = [("codes", c_void_p), ("scales", c_void_p), ("sums", c_void_p), ("range", c_void_p)]


_FUNCTIONS = {  # name: (result, arguments)
    "nibble_version": (c_char_p, []),
    "nibble_weight_packed_bytes": (Status, [POINTER(c_size_t), POINTER(WeightDesc)]),
    "nibble_weight_pack": (Status, [c_void_p, c_size_t, POINTER(WeightDesc), c_int32]),
    "nibble_weight_open": (Status, [POINTER(c_void_p), c_void_p, c_size_t]),
    "nibble_weight_k": (c_int64, [c_void_p]),
    "nibble_weight_n": (c_int64, [c_void_p]),
    "nibble_weight_group_size": (c_int64, [c_void_p]),
    "nibble_dequantize": (Status, [POINTER(WeightDesc), c_void_p]),
    "nibble_gemm_plan": (Status, [POINTER(Plan), POINTER(Problem), c_char_p]),
    "nibble_plan_kernel": (c_char_p, [POINTER(Plan)]),
    "nibble_gemm_workspace_bytes": (c_size_t, [POINTER(Plan)]),
    "nibble_gemm_packed": (Status, [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_int64,
                                    c_void_p]),
    "nibble_gemm_quantized": (Status, [c_void_p, c_void_p, c_int64, c_void_p, POINTER(Target),
                                       c_int32, c_void_p]),
    "nibble_quantize_activations": (Status, [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p]),
    "nibble_kernel_count": (c_int32, []),
    "nibble_kernel_name": (c_char_p, [c_int32]),
    "nibble_kernel_missing": (c_char_p, [c_int32]),
    "nibble_cuda_device_count": (Status, [POINTER(c_int32)]),
    "nibble_cuda_packed_bytes": (Status, [POINTER(c_size_t), POINTER(WeightDesc)]),
    "nibble_cuda_pack": (Status, [c_void_p, c_size_t, POINTER(WeightDesc), c_int32]),
    "nibble_cuda_gemm_plan": (Status, [POINTER(CudaPlan), POINTER(Problem), c_int32, c_char_p]),
    "nibble_cuda_plan_kernel": (c_char_p, [POINTER(CudaPlan)]),
    "nibble_cuda_workspace_bytes": (c_size_t, [POINTER(CudaPlan)]),
    "nibble_cuda_gemm_packed": (Status, [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_int64,
                                         c_void_p, c_void_p]),
    "nibble_cuda_zeroed_bytes": (c_size_t, [POINTER(CudaPlan)]),
    "nibble_cuda_quantize_activations": (Status, [c_void_p, c_void_p, POINTER(CudaOperand),
                                                  c_void_p]),
    "nibble_cuda_gemm_quantized": (Status, [c_void_p, POINTER(CudaOperand), c_void_p, c_size_t,
                                            c_void_p, c_int64, c_void_p, c_void_p]),
}


def library_path() -> Path:
    """NIBBLE_LIBRARY if it is set, else the library of the installed package."""
    named = os.environ.get("NIBBLE_LIBRARY")
    if named:
        return Path(named)
    inside = NATIVE / "lib" / "libnibble.so"
    if inside.exists():
        return inside
    raise LibraryNotFound(f"libnibble.so: {inside} does not exist and NIBBLE_LIBRARY is not set; "
                          "`pip install .` builds it, or name one that CMake built")


def _load() -> ctypes.CDLL:
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
        library.nibble_abi_version.restype = c_int32
        library.nibble_abi_version.argtypes = []
        version = library.nibble_abi_version()
        if version == ABI_VERSION:
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library
    except (OSError, AttributeError) as error:  # AttributeError: an older library
        raise LibraryNotFound(f"{path}: {error}") from error
    raise LibraryNotFound(f"{path}: C ABI version {version}, expected {ABI_VERSION}")


lib = _load()


def check(status: Status, what: str = "") -> None:
    """Raises the exception of a status that is not ok; `what` is put in front of its message."""
    if status.code:
        message = status.message.decode("utf-8", "replace")
        raise BY_CODE.get(status.code, NibbleError)(f"{what}: {message}" if what else message)
