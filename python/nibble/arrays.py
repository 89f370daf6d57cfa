"""Arrays of other libraries as addresses: numpy's own protocol, or DLPack (which has bfloat16).
Only memory of the CPU; nothing is copied."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np

from .errors import InvalidArgument

_CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost
_DLPACK_TYPES = {(0, 8): "int8", (0, 32): "int32", (0, 64): "int64", (1, 8): "uint8",
                 (1, 16): "uint16", (1, 32): "uint32", (2, 16): "float16", (2, 32): "float32",
                 (2, 64): "float64", (4, 16): "bfloat16"}


class _DLTensor(ctypes.Structure):  # dlpack.h, the part that a capsule "dltensor" begins with
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32),
                ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8),
                ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


@dataclasses.dataclass(frozen=True)
class Array:
    """What is known of an array; `owner` keeps its memory alive."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    dtype: str                # numpy's name, or "bfloat16"
    owner: object
    writable: bool = True

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} with strides {list(self.strides)}"

    @property
    def rows_contiguous(self) -> bool:
        return not self.shape or self.strides[-1] == 1 or self.shape[-1] <= 1 or 0 in self.shape

    @property
    def contiguous(self) -> bool:
        if 0 in self.shape:
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


def view(name: str, value) -> Array:
    """`value` as an Array. TypeError, naming the argument, if it is none."""
    if isinstance(value, np.ndarray):
        return _of_numpy(name, value)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return _of_dlpack(name, value)
    raise TypeError(f"{name}: expected a numpy array or one with __dlpack__, found "
                    f"{type(value).__name__}")


def _of_numpy(name: str, array: np.ndarray) -> Array:
    size = array.dtype.itemsize
    if size == 0 or any(stride % size for stride in array.strides) or not array.dtype.isnative:
        raise InvalidArgument(f"{name}: expected whole little-endian elements, found "
                              f"{array.dtype.str} with strides of {list(array.strides)} bytes")
    return Array(array.ctypes.data, array.shape, tuple(s // size for s in array.strides),
                 array.dtype.name, array, array.flags.writeable)


def _of_dlpack(name: str, value) -> Array:
    device = value.__dlpack_device__()
    if int(device[0]) not in _CPU_DEVICES:
        raise InvalidArgument(f"{name}: expected memory of the CPU, found DLPack device type "
                              f"{int(device[0])}; nibble.torch runs on GPUs")
    capsule = value.__dlpack__()
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    kind = _DLPACK_TYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if kind is None:
        raise InvalidArgument(f"{name}: expected numbers of a known type, found DLPack code "
                              f"{tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
    else:  # absent: row-major
        strides = tuple(int(np.prod(shape[i + 1:], dtype=np.int64)) for i in range(tensor.ndim))
    return Array((tensor.data or 0) + tensor.byte_offset, shape, strides, kind, (value, capsule))


def require(name: str, array: Array, dtypes: tuple[str, ...], shape: tuple | None = None) -> Array:
    """`array` if it is contiguous, of one of `dtypes` and of `shape`; else InvalidArgument."""
    if array.dtype in dtypes and array.contiguous and shape in (None, array.shape):
        return array
    wanted = " or ".join(dtypes) + ("" if shape is None else f" {list(shape)}")
    raise InvalidArgument(f"{name}: expected {wanted}, contiguous, found {array}")
