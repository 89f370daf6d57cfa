"""Nibble in torch: operators (torch.ops.nibble), packed weights as tensors, and a linear layer.

Importing this imports torch; `import nibble` alone does not. For inference: nothing here has a
gradient.
"""

from . import ops as _ops  # noqa: F401  registers torch.ops.nibble
from .layer import AwqLinear
from .packing import pack_awq, shard_group_size

__all__ = ["AwqLinear", "pack_awq", "shard_group_size"]
