"""Nibble: matrix products with 4-bit AWQ weights and quantized activations.

    import nibble
    weight = nibble.pack_awq(qweight, qzeros, scales, group_size=128)
    y = nibble.linear(x, weight, mode="w4a8")

numpy and DLPack arrays here; nibble.torch and nibble.transformers are imported by name and bring
torch. docs/python.md is the manual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._library import lib as _lib
from .errors import (InvalidArgument, LibraryNotFound, NibbleError, NonFinite, OutOfMemory,
                     Unsupported)
from .modes import Granularity, Mode, Spec, make_spec

if TYPE_CHECKING:
    from .products import Weight, dequantize, linear, pack_awq, quantize

__version__ = _lib.nibble_version().decode()


def kernels() -> dict[str, str | None]:
    """All CPU kernels by name, and why one cannot run on this machine (None: it can)."""
    names = {}
    for index in range(_lib.nibble_kernel_count()):
        reason = _lib.nibble_kernel_missing(index)
        names[_lib.nibble_kernel_name(index).decode()] = reason and reason.decode()
    return names


def __getattr__(name: str):  # numpy is imported when it is first needed
    if name in _WITH_NUMPY:
        from . import products
        globals().update({each: getattr(products, each) for each in _WITH_NUMPY})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_WITH_NUMPY = ("Weight", "dequantize", "linear", "pack_awq", "quantize")
__all__ = ["Granularity", "InvalidArgument", "LibraryNotFound", "Mode", "NibbleError", "NonFinite",
           "OutOfMemory", "Spec", "Unsupported", "Weight", "dequantize", "kernels", "linear",
           "make_spec", "pack_awq", "quantize"]
