"""How a product treats its activations: Mode, Granularity, and Spec, which holds all of it."""

from __future__ import annotations

import dataclasses
import enum
import math

from .errors import InvalidArgument


class Mode(enum.IntEnum):
    """Values are those of nibble_mode."""

    W4A16 = 0  # float activations
    W4A8 = 1   # int8 activations
    W4A4 = 2   # int4 activations
    W4A8_FP8 = 3   # e4m3 activations; CUDA devices only
    W4A4_WIDE = 4  # W4A4 with some groups in int8; Spec.wide_groups implies it


class Granularity(enum.IntEnum):
    """What shares one activation scale. Values are those of nibble_granularity."""

    TENSOR = 0
    TOKEN = 1
    GROUP = 2
    STATIC_TENSOR = 3
    STATIC_GROUP = 4


MODES = {"w4a16": Mode.W4A16, "w4a8": Mode.W4A8, "w4a8-fp8": Mode.W4A8_FP8, "w4a4": Mode.W4A4}
GRANULARITIES = {"tensor": Granularity.TENSOR, "token": Granularity.TOKEN,
                 "group": Granularity.GROUP, "static-tensor": Granularity.STATIC_TENSOR,
                 "static-group": Granularity.STATIC_GROUP}
STATIC = (Granularity.STATIC_TENSOR, Granularity.STATIC_GROUP)


def _named(value, names: dict, argument: str):
    found = names.get(value) if isinstance(value, str) else None
    if found is None:
        raise InvalidArgument(f"{argument}: expected one of {', '.join(names)}, found {value!r}")
    return found


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one linear is run. Checked when it is made; made by make_spec from names."""

    mode: Mode = Mode.W4A8
    granularity: Granularity = Granularity.TOKEN
    symmetric: bool = True                    # False: zero points; W4A4, dynamic scales only
    clip: float = 1.0                         # the range of dynamic scales is multiplied by it
    static_scales: tuple[float, ...] = ()     # 1, or one per group
    wide_groups: tuple[int, ...] = ()         # W4A4 per group: one flag per group, 1: int8

    def __post_init__(self) -> None:
        static = self.granularity in STATIC
        if not 0 < self.clip <= 1:
            raise InvalidArgument(f"clip: expected a number in (0, 1], found {self.clip!r}")
        if not self.symmetric and (self.mode != Mode.W4A4 or static):
            raise InvalidArgument("symmetric: expected True but for w4a4 with dynamic scales, "
                                  "found False")
        if static != bool(self.static_scales) and self.mode != Mode.W4A16:
            raise InvalidArgument(f"static_scales: expected {'some' if static else 'none'} with "
                                  f"granularity {self.granularity_name}, found "
                                  f"{len(self.static_scales)}")
        for scale in self.static_scales:
            if not (math.isfinite(scale) and scale > 0):
                raise InvalidArgument(f"static_scales: expected positive floats, found {scale!r}")
        if self.mode == Mode.W4A8_FP8 and self.granularity in (Granularity.GROUP,
                                                               Granularity.STATIC_GROUP):
            raise InvalidArgument("granularity: expected token, tensor or static-tensor with "
                                  f"w4a8-fp8, found {self.granularity_name}")
        if self.wide_groups and (self.mode, self.granularity) != (Mode.W4A4, Granularity.GROUP):
            raise InvalidArgument("wide_groups: expected none except in w4a4 per group")

    @property
    def granularity_name(self) -> str:
        return next(name for name, value in GRANULARITIES.items() if value == self.granularity)

    @property
    def product_mode(self) -> Mode:
        """The mode that the C ABI is given."""
        return Mode.W4A4_WIDE if any(self.wide_groups) else self.mode

    def __str__(self) -> str:
        name = next((name for name, mode in MODES.items() if mode == self.mode),
                    self.mode.name.lower())
        if self.mode == Mode.W4A16:
            return name
        wide = sum(map(bool, self.wide_groups))
        return (f"{name} {self.granularity_name}{'' if self.symmetric else '-asym'}"
                + (f" clip {self.clip:.2f}" if self.clip != 1 else "")
                + (f" ({wide} of {len(self.wide_groups)} groups int8)" if wide else ""))


def make_spec(mode: str | Spec = "w4a8", granularity: str | None = None,
              symmetric: bool | None = None, clip: float = 1.0, static_scales=(),
              wide_groups=()) -> Spec:
    """A Spec from names. Defaults are the library's: w4a8 per token; w4a4 per group, with zero
    points (symmetric=False) where its scales are dynamic."""
    if isinstance(mode, Spec):
        return mode
    which = _named(mode, MODES, "mode")
    if granularity is None:
        granularity = "group" if which == Mode.W4A4 else "token"
    scales = _named(granularity, GRANULARITIES, "granularity")
    if symmetric is None:
        symmetric = which != Mode.W4A4 or scales in STATIC
    return Spec(which, scales, bool(symmetric), float(clip), tuple(map(float, static_scales)),
                tuple(int(bool(flag)) for flag in wide_groups))
