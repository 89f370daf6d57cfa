"""Quantization groups of a part of a weight's rows: the shards of tensor parallelism."""

from __future__ import annotations

import math

from .errors import InvalidArgument

SMALLEST_PIECE = 32  # shorter groups cost more for scales than they are worth


def shard_group_size(group_size: int, k_offset: int, k: int) -> int:
    """The group size of rows [k_offset, k_offset + k) of a weight with groups of `group_size`: the
    largest that lets no group straddle the ends. Scales and zero points are repeated for it, so
    that the product stays exact. InvalidArgument where it is below 32 and not the weight's own."""
    if group_size < 1 or k < 1 or k_offset < 0:
        raise InvalidArgument(f"group_size, k, k_offset: expected positive sizes, found "
                              f"{group_size}, {k}, {k_offset}")
    size = math.gcd(group_size, k_offset, k)
    if size < min(SMALLEST_PIECE, group_size):
        raise InvalidArgument(
            f"k_offset: rows {k_offset} to {k_offset + k} cut groups of {group_size} into pieces "
            f"of {size}, expected at least {SMALLEST_PIECE}; use fewer ranks")
    return size


def source_groups(group_size: int, k_offset: int, k: int) -> list[int] | None:
    """For each group of the shard, the row of its scales; scales[0] is those of the group of row
    k_offset. None: they are taken as they are."""
    size = shard_group_size(group_size, k_offset, k)
    if size == group_size:
        return None
    first = k_offset % group_size
    return [(first + row) // group_size for row in range(0, k, size)]


def groups_met(group_size: int, k_offset: int, k: int) -> int:
    """How many groups of the whole weight rows [k_offset, k_offset + k) lie in."""
    return -(-(k_offset + k) // group_size) - k_offset // group_size
