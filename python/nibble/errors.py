"""What can go wrong, as exceptions. Each names the argument, the expected and the found."""

from __future__ import annotations


class NibbleError(Exception):
    """Base class of everything that the library refuses."""


class InvalidArgument(NibbleError, ValueError):
    """An argument is not what the documentation asks for."""


class Unsupported(NibbleError, RuntimeError):
    """Well-formed, but no kernel, format or device here handles it."""


class NonFinite(NibbleError, ValueError):
    """NaN or infinity in activations that are to be quantized."""


class OutOfMemory(NibbleError, MemoryError):
    """Memory could not be allocated."""


class LibraryNotFound(NibbleError, ImportError):
    """libnibble.so is missing, or is not the one that this package was written for."""


# nibble_code of include/nibble.h
BY_CODE = {1: InvalidArgument, 2: Unsupported, 3: NibbleError, 4: NibbleError, 5: OutOfMemory,
           6: NonFinite, 7: NibbleError}
