"""Which Spec each linear of a model runs with: one mode for all, or the plan that `nibble plan`
saved in config.json (quantization_config.nibble; src/model/plan_config.h has its form)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from .errors import InvalidArgument
from .modes import GRANULARITIES, MODES, STATIC, Granularity, Mode, Spec, make_spec

SCHEMA_VERSION = 1
SLOTS = {"qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "o": ("o_proj",),
         "gate_up": ("gate_proj", "up_proj", "gate_up_proj"), "down": ("down_proj",)}
_SLOT_OF = {name: slot for slot, names in SLOTS.items() for name in names}
_LINEAR = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$")
_KEYS = ("mode", "granularity", "symmetric", "clip", "static_scales", "wide_groups")


# What a plan in config.json may say: as the command-line tool.
PLAN_MODES = {name: mode for name, mode in MODES.items() if mode != Mode.W4A8_FP8}


def slot_of(name: str) -> tuple[int, str] | None:
    """(layer, slot) of a linear by its name in the model; None: it is in no slot."""
    match = _LINEAR.search(name)
    slot = match and _SLOT_OF.get(match[2])
    return (int(match[1]), slot) if slot else None


class ModelPlan:
    """The Spec of every linear. Made by choose_plan."""

    def __init__(self, layers: list[dict[str, Spec]] | None, mode: str,
                 granularity: str | None) -> None:
        self._layers, self.mode, self._granularity = layers, mode, granularity

    def spec(self, name: str) -> Spec:
        """The Spec of the linear `name`. With one mode for all and no granularity, the default
        mix: per group for o and down, whose inputs AWQ has not smoothed, and for w4a4; else, and
        in w4a8-fp8, per token."""
        place = slot_of(name)
        if self._layers is None:
            rough = self.mode != "w4a8-fp8" and (place is None or place[1] in ("o", "down")
                                                 or self.mode == "w4a4")
            return make_spec(self.mode, self._granularity or ("group" if rough else "token"))
        if place is None or place[0] >= len(self._layers):
            raise InvalidArgument(f"{name}: the plan in config.json has {len(self._layers)} layers "
                                  f"of {', '.join(SLOTS)} and says nothing about it")
        return self._layers[place[0]][place[1]]

    def __str__(self) -> str:
        if self._layers is None:
            return self.mode + (f" {self._granularity}" if self._granularity else "")
        return f"the plan in config.json ({len(self._layers)} layers)"


def has_plan(quantization_config: dict) -> bool:
    return quantization_config.get("nibble") is not None


def choose_plan(mode: str | None, granularity: str | None, quantization_config: dict) -> ModelPlan:
    """mode None: the plan in config.json if it has one, else w4a8. "auto": that plan, or an error.
    quantization_config: that block of config.json."""
    if mode is None:
        mode = "auto" if has_plan(quantization_config) else "w4a8"
    if mode != "auto":
        if mode not in MODES:
            raise InvalidArgument(f"mode: expected one of {', '.join(MODES)}, auto, found {mode!r}")
        if granularity is not None and (granularity not in GRANULARITIES
                                        or GRANULARITIES[granularity] in STATIC):
            raise InvalidArgument("granularity: expected token, group or tensor, found "
                                  f"{granularity!r}")
        make_spec(mode, granularity)  # refuses what does not go together
        return ModelPlan(None, mode, granularity)
    if granularity is not None:
        raise InvalidArgument(f"granularity: expected None with a plan, found {granularity!r}")
    if not has_plan(quantization_config):
        raise InvalidArgument("config.json has no plan (quantization_config.nibble); `nibble plan` "
                              "makes one")
    return ModelPlan(_read_layers(quantization_config["nibble"]), "auto", None)


def read_config(directory: str | Path) -> dict:
    """The quantization_config of a model directory: at the top of config.json or in its text part;
    {} if there is none."""
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    for owner in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(owner, dict) and isinstance(owner.get("quantization_config"), dict):
            return owner["quantization_config"]
    return {}


# ---- the block ----------------------------------------------------------------------------------

def _refuse(where: str, expected: str, found) -> InvalidArgument:
    return InvalidArgument(f"config.json: {where}: expected {expected}, found {found!r:.80}")


def _known(value, where: str, known) -> dict:
    if not isinstance(value, dict):
        raise _refuse(where, "an object", value)
    for key in value:
        if key not in known:
            raise InvalidArgument(f"config.json: {where}: unknown key {key!r}; known are "
                                  f"{', '.join(known)}")
    return value


def _read_layers(block) -> list[dict[str, Spec]]:
    where = "quantization_config.nibble"
    if not isinstance(block, dict):
        raise _refuse(where, "an object", block)
    if block.get("schema_version") != SCHEMA_VERSION:
        raise _refuse(f"{where}.schema_version", str(SCHEMA_VERSION), block.get("schema_version"))
    layers = block.get("layers")
    if not isinstance(layers, list) or not layers:
        raise _refuse(f"{where}.layers", "an array", layers)
    plan = []
    for index, layer in enumerate(layers):
        place = f"{where}.layers[{index}]"
        _known(layer, place, SLOTS)
        plan.append({slot: _read_spec(layer.get(slot), f"{place}.{slot}") for slot in SLOTS})
    return plan


def _positive(value, where: str, most: float) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) \
            and math.isfinite(value) and 0 < value <= most:
        return float(value)
    raise _refuse(where, "a number in (0, 1]" if most == 1 else "a positive float", value)


def _read_spec(value, where: str) -> Spec:
    _known(value, where, _KEYS)
    mode = PLAN_MODES.get(value.get("mode")) if isinstance(value.get("mode"), str) else None
    if mode is None:
        raise _refuse(f"{where}.mode", f"one of {', '.join(PLAN_MODES)}", value.get("mode"))
    if mode == Mode.W4A16:
        _known(value, f"{where} of mode w4a16", ("mode",))
        return Spec(mode)
    name = value.get("granularity")
    if not isinstance(name, str) or name not in GRANULARITIES:
        raise _refuse(f"{where}.granularity", f"one of {', '.join(GRANULARITIES)}", name)
    granularity = GRANULARITIES[name]
    symmetric = value.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise _refuse(f"{where}.symmetric", "true or false", symmetric)
    scales = value.get("static_scales", [])
    if not isinstance(scales, list):
        raise _refuse(f"{where}.static_scales", "an array", scales)
    if granularity == Granularity.STATIC_TENSOR and len(scales) != 1:
        raise _refuse(f"{where}.static_scales", "an array of 1", scales)
    scales = [_positive(scale, f"{where}.static_scales[{i}]", 3.4e38)
              for i, scale in enumerate(scales)]
    clip = _positive(value["clip"], f"{where}.clip", 1) if "clip" in value else 1.0
    wide = ()
    if "wide_groups" in value:
        wide = _read_wide(value["wide_groups"], f"{where}.wide_groups")
    try:
        return Spec(mode, granularity, symmetric, clip, tuple(scales), wide)
    except InvalidArgument as error:
        raise InvalidArgument(f"config.json: {where}: {error}") from error


def _read_wide(value, where: str) -> tuple[int, ...]:
    """{"of": 9, "groups": [0, 4]} as nine flags."""
    _known(value, where, ("of", "groups"))
    of, groups = value.get("of"), value.get("groups")
    if not isinstance(of, int) or isinstance(of, bool) or of < 1:
        raise _refuse(f"{where}.of", "a positive integer", of)
    whole = isinstance(groups, list) and all(type(g) is int and 0 <= g < of for g in groups)
    if not whole or sorted(set(groups)) != groups:
        raise _refuse(f"{where}.groups", f"ascending integers below {of}", groups)
    return tuple(int(g in groups) for g in range(of))
