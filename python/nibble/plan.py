"""How each linear layer of a model is run: one mode for all, or the plan that `nibble plan` keeps in
config.json (quantization_config -> "nibble"; its schema is in src/model/plan_config.h).

Pure Python: reads dicts, imports neither numpy nor torch. Not here: which kernel runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA_VERSION = 1
MODES = ("w4a16", "w4a8", "w4a4")
GRANULARITIES = ("tensor", "token", "group", "static-tensor", "static-group")
SLOTS = ("qkv", "o", "gate_up", "down")

_SLOT_OF_LINEAR = {
    "qkv_proj": "qkv", "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o",
    "gate_up_proj": "gate_up", "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down",
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?([a-z_]+)$")


class PlanError(ValueError):
    """A mode or a plan that is not what it should be; the message names the key."""


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """How one linear layer is run. Beyond mode, nothing matters in w4a16."""

    mode: str = "w4a16"
    granularity: str = "token"
    symmetric: bool = True
    clip: float = 1.0
    static_scales: tuple[float, ...] = ()  # static-tensor: 1; static-group: K / group size
    wide_groups: tuple[int, ...] = ()  # w4a4 per group: 1 for each K-group that gets 8 bits

    def describe(self) -> str:
        """As the command-line tool prints it: "w4a8 token", "w4a4 group-asym clip 0.95", ..."""
        if self.mode == "w4a16":
            return self.mode
        text = f"{self.mode} {self.granularity}{'' if self.symmetric else '-asym'}"
        if self.clip != 1.0:
            text += f" clip {self.clip:.2f}"
        if any(self.wide_groups):
            text += f" ({sum(self.wide_groups)} of {len(self.wide_groups)} groups int8)"
        return text


def is_static(granularity: str) -> bool:
    return granularity.startswith("static-")


def uniform_spec(mode: str, slot: str | None, granularity: str | None = None) -> LinearSpec:
    """`mode` for a linear of `slot` (None: one of no slot). Without a granularity the default mix of
    the tool: per group for o, down and w4a4, per token for the rest; w4a4 has zero points."""
    if mode not in MODES:
        raise PlanError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}")
    if granularity is not None and granularity not in ("tensor", "token", "group"):
        raise PlanError(f"granularity: expected tensor, token or group, found {granularity!r}")
    rough = slot not in ("qkv", "gate_up") or mode == "w4a4"
    return LinearSpec(mode, granularity or ("group" if rough else "token"), mode != "w4a4")


def place_of(name: str) -> tuple[int | None, str | None]:
    """Layer and slot of a linear by its name in transformers or vLLM, fused or not; (None, None) for
    what is in no decoder layer: "model.layers.3.self_attn.qkv_proj" -> (3, "qkv")."""
    found = _LAYER.search(name)
    slot = _SLOT_OF_LINEAR.get(found[2]) if found else None
    return (int(found[1]), slot) if found and slot else (None, None)


# ---- the plan in config.json --------------------------------------------------------------------


def read_plan(quantization_config: Mapping[str, Any]) -> list[dict[str, LinearSpec]] | None:
    """The specs of every layer and slot of a quantization_config; None if it holds no plan. Whether
    they fit the model is for `check_plan` and `check_spec`."""
    if "nibble" not in quantization_config:
        return None
    where = "quantization_config.nibble"
    block = _object(quantization_config["nibble"], where)
    if block.get("schema_version") != SCHEMA_VERSION or block["schema_version"] is True:
        raise _refusal(where + ".schema_version", str(SCHEMA_VERSION), block.get("schema_version"))
    layers = block.get("layers")
    if not isinstance(layers, list):
        raise _refusal(where + ".layers", "an array", layers)
    plan = []
    for index, value in enumerate(layers):
        place = f"{where}.layers[{index}]"
        layer = _object(value, place, SLOTS)
        plan.append({slot: _spec(layer.get(slot), f"{place}.{slot}") for slot in SLOTS})
    return plan


def check_plan(plan: Sequence[Mapping[str, LinearSpec]], layers: int) -> None:
    """That the plan is of a model of so many layers."""
    if len(plan) != layers:
        raise PlanError(f"config.json: quantization_config.nibble.layers: expected an array of "
                        f"{layers}, the model's layers, found one of {len(plan)}")


def check_spec(spec: LinearSpec, name: str, k: int, group_size: int) -> None:
    """That what a spec says per K-group fits a linear of k input channels."""
    if spec.granularity == "static-group" and len(spec.static_scales) != k // group_size:
        raise PlanError(f"{name}: static_scales: expected {k // group_size}, one per group of "
                        f"{group_size} of its {k} input channels, found {len(spec.static_scales)}")
    if spec.wide_groups and len(spec.wide_groups) != k // group_size:
        raise PlanError(f"{name}: wide_groups.of: expected {k // group_size}, found "
                        f"{len(spec.wide_groups)}")


def _refusal(where: str, expected: str, found: Any) -> PlanError:
    if isinstance(found, (dict, list)):
        text = f"{'an object' if isinstance(found, dict) else 'an array'} of {len(found)}"
    else:
        text = "nothing" if found is None else json.dumps(found, default=repr)
    return PlanError(f"config.json: {where}: expected {expected}, found {text}")


def _object(value: Any, where: str, known: Sequence[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _refusal(where, "an object", value)
    for key in value:
        if known is not None and key not in known:
            raise PlanError(f"config.json: {where}: unknown key {json.dumps(key)}; known are "
                            f"{', '.join(known)}")
    return value


def _positive(value: Any, where: str, most: float, expected: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= most:
        raise _refusal(where, expected, value)
    return float(value)


def _spec(value: Any, where: str) -> LinearSpec:
    fields = [field.name for field in dataclasses.fields(LinearSpec)]
    value = _object(value, where, fields)
    mode = value.get("mode")
    if mode not in MODES:
        raise _refusal(where + ".mode", "one of " + ", ".join(MODES), mode)
    if mode == "w4a16":
        _object(value, where + " of mode w4a16", ("mode",))
        return LinearSpec(mode)
    granularity = value.get("granularity")
    if granularity not in GRANULARITIES:
        raise _refusal(where + ".granularity", "one of " + ", ".join(GRANULARITIES), granularity)
    symmetric = value.get("symmetric", True)
    may_be_false = mode == "w4a4" and not is_static(granularity)
    if not isinstance(symmetric, bool) or not (symmetric or may_be_false):
        raise _refusal(where + ".symmetric", "true or false" if may_be_false else
                       "true (only w4a4 with dynamic scales has zero points)", symmetric)
    clip = _positive(value.get("clip", 1.0), where + ".clip", 1.0, "a number in (0, 1]")
    return LinearSpec(mode, granularity, symmetric, clip, _scales(value, where, granularity),
                      _wide_groups(value, where, mode, granularity))


def _scales(value: Mapping[str, Any], where: str, granularity: str) -> tuple[float, ...]:
    where += ".static_scales"
    scales = value.get("static_scales")
    if not is_static(granularity):
        if scales is not None:
            raise _refusal(where, "none with a dynamic granularity", scales)
        return ()
    if not isinstance(scales, list) or not scales or \
            (granularity == "static-tensor" and len(scales) != 1):
        raise _refusal(where, "an array of 1" if granularity == "static-tensor" else
                       "the scales of a static granularity", scales)
    return tuple(_positive(scale, f"{where}[{i}]", 3.4028234663852886e38, "a positive float")
                 for i, scale in enumerate(scales))


def _wide_groups(value: Mapping[str, Any], where: str, mode: str,
                 granularity: str) -> tuple[int, ...]:
    if value.get("wide_groups") is None:
        return ()
    where += ".wide_groups"
    if mode != "w4a4" or granularity != "group":
        raise _refusal(where, "none except in w4a4 per group", value["wide_groups"])
    wide = _object(value["wide_groups"], where, ("of", "groups"))
    count, groups = wide.get("of"), wide.get("groups")
    if not isinstance(count, int) or isinstance(count, bool) or count <= 0:
        raise _refusal(where + ".of", "a positive integer", count)
    if not isinstance(groups, list):
        raise _refusal(where + ".groups", "an array", groups)
    flags, least = [0] * count, 0
    for i, group in enumerate(groups):
        if not isinstance(group, int) or isinstance(group, bool) or not least <= group < count:
            raise _refusal(f"{where}.groups[{i}]", f"ascending integers below {count}", group)
        flags[group], least = 1, group + 1
    return tuple(flags)
