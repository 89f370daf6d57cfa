"""Nibble: matrix products with 4-bit AWQ weights and quantized activations.

    import nibble
    weight = nibble.pack_awq(qweight, qzeros, scales, group_size=128)
    y = nibble.linear(x, weight, mode="w4a8")

numpy and DLPack arrays here; nibble.torch and nibble.transformers are imported by name and bring
torch. docs/python.md is the manual.
"""

from ._library import lib as _lib
from .errors import (InvalidArgument, LibraryNotFound, NibbleError, NonFinite, OutOfMemory,
                     Unsupported)
from .modes import Granularity, Mode, Spec, make_spec

__version__ = _lib.nibble_version().decode()


def kernels() -> dict[str, str | None]:
    """All CPU kernels by name, and why one cannot run on this machine (None: it can)."""
    names = {}
    for index in range(_lib.nibble_kernel_count()):
        reason = _lib.nibble_kernel_missing(index)
        names[_lib.nibble_kernel_name(index).decode()] = reason and reason.decode()
    return names


__all__ = ["Granularity", "InvalidArgument", "LibraryNotFound", "Mode", "NibbleError", "NonFinite",
           "OutOfMemory", "Spec", "Unsupported", "kernels", "make_spec"]
