"""How each linear layer of a model is run: one mode for all, or the plan that `nibble plan` keeps in
config.json (quantization_config -> "nibble"; its schema is in src/model/plan_config.h).

Pure Python: reads dicts, imports neither numpy nor torch. Not here: which kernel runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InvalidArgument
from .modes import Granularity, Spec, make_spec

SCHEMA_VERSION = 1
SLOTS = ("qkv", "o", "gate_up", "down")

_SPEC_KEYS = ("mode", "granularity", "symmetric", "clip", "static_scales", "wide_groups")
_SLOT_OF_LINEAR = {
    "qkv_proj": "qkv", "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o",
    "gate_up_proj": "gate_up", "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down",
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?([a-z_]+)$")


def place_of(name: str) -> tuple[int | None, str | None]:
    """Layer and slot of a linear by its name in transformers or vLLM, fused or not; (None, None) for
    what is in no decoder layer: "model.layers.3.self_attn.qkv_proj" -> (3, "qkv")."""
    found = _LAYER.search(name)
    slot = _SLOT_OF_LINEAR.get(found[2]) if found else None
    return (int(found[1]), slot) if found and slot else (None, None)


def uniform_spec(mode: str, slot: str | None, granularity: str | None = None) -> Spec:
    """`mode` for a linear of `slot` (None: one of no slot). Without a granularity the default mix of
    the command-line tool: per group for o, down and w4a4, per token for the rest."""
    if granularity is None and mode == "w4a8" and slot not in ("qkv", "gate_up"):
        granularity = "group"
    return make_spec(mode, granularity)


# ---- the plan in config.json --------------------------------------------------------------------


def read_plan(quantization_config: Mapping[str, Any]) -> list[dict[str, Spec]] | None:
    """The specs of every layer and slot of a quantization_config; None if it holds no plan.
    InvalidArgument, naming the key. Whether they fit the model: check_plan, check_spec."""
    if "nibble" not in quantization_config:
        return None
    where = "quantization_config.nibble"
    block = _object(quantization_config["nibble"], where)
    version = block.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise _refusal(where + ".schema_version", str(SCHEMA_VERSION), version)
    layers = block.get("layers")
    if not isinstance(layers, list):
        raise _refusal(where + ".layers", "an array", layers)
    plan = []
    for index, value in enumerate(layers):
        place = f"{where}.layers[{index}]"
        layer = _object(value, place, SLOTS)
        plan.append({slot: _spec(layer.get(slot), f"{place}.{slot}") for slot in SLOTS})
    return plan


def check_plan(plan: Sequence[Mapping[str, Spec]], layers: int) -> None:
    """That the plan is of a model of so many layers."""
    if len(plan) != layers:
        raise InvalidArgument(f"config.json: quantization_config.nibble.layers: expected an array "
                              f"of {layers}, the model's layers, found one of {len(plan)}")


def check_spec(spec: Spec, name: str, k: int, group_size: int) -> None:
    """That what a spec says of each K-group fits a linear of k input channels."""
    for key, values, needed in (
            ("static_scales", spec.static_scales, spec.granularity == Granularity.STATIC_GROUP),
            ("wide_groups", spec.wide_groups, bool(spec.wide_groups))):
        if needed and len(values) != k // group_size:
            raise InvalidArgument(f"{name}: {key}: expected {k // group_size}, one for each group "
                                  f"of {group_size} of its {k} input channels, found {len(values)}")


def _refusal(where: str, expected: str, found: Any) -> InvalidArgument:
    if isinstance(found, (dict, list)):
        text = f"{'an object' if isinstance(found, dict) else 'an array'} of {len(found)}"
    else:
        text = "nothing" if found is None else json.dumps(found, default=repr)
    return InvalidArgument(f"config.json: {where}: expected {expected}, found {text}")


def _object(value: Any, where: str, known: Sequence[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _refusal(where, "an object", value)
    for key in value:
        if known is not None and key not in known:
            raise InvalidArgument(f"config.json: {where}: unknown key {json.dumps(key)}; known are "
                                  f"{', '.join(known)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _spec(value: Any, where: str) -> Spec:
    value = dict(_object(value, where, _SPEC_KEYS))
    if "mode" not in value:
        raise _refusal(where + ".mode", "the name of a mode", None)
    if value["mode"] == "w4a16":
        _object(value, where + " of mode w4a16", ("mode",))
    elif "granularity" not in value:
        raise _refusal(where + ".granularity", "the name of a granularity", None)
    symmetric, clip, scales = (value.get("symmetric", True), value.get("clip", 1.0),
                               value.get("static_scales", []))
    if not isinstance(symmetric, bool):
        raise _refusal(where + ".symmetric", "true or false", symmetric)
    if not _is_number(clip):
        raise _refusal(where + ".clip", "a number in (0, 1]", clip)
    if not isinstance(scales, list) or not all(map(_is_number, scales)):
        raise _refusal(where + ".static_scales", "an array of numbers", scales)
    flags = ()
    if value.get("wide_groups") is not None:
        flags = _wide_groups(value["wide_groups"], where + ".wide_groups")
    try:
        spec = make_spec(value["mode"], value.get("granularity"), symmetric, clip, scales, flags)
    except InvalidArgument as error:
        raise InvalidArgument(f"config.json: {where}: {error}") from None
    if spec.granularity == Granularity.STATIC_TENSOR and len(scales) != 1:
        raise _refusal(where + ".static_scales", "an array of 1", scales)
    return spec


def _wide_groups(value: Any, where: str) -> tuple[int, ...]:
    """{"of": 9, "groups": [0, 4]} as nine flags."""
    wide = _object(value, where, ("of", "groups"))
    count, groups = wide.get("of"), wide.get("groups")
    if not isinstance(count, int) or isinstance(count, bool) or count <= 0:
        raise _refusal(where + ".of", "a positive integer", count)
    if not isinstance(groups, list):
        raise _refusal(where + ".groups", "an array", groups)
    flags, least = [0] * count, 0
    for i, group in enumerate(groups):
        if not isinstance(group, int) or isinstance(group, bool) or not least <= group < count:
            raise _refusal(f"{where}.groups[{i}]", f"ascending integers below {count}", group)
        flags[group], least = 1, group
    return tuple(flags)
