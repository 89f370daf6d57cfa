"""transformers with Nibble's linears: one call, then from_pretrained as ever.

    import nibble.transformers
    nibble.transformers.enable(mode="w4a8")
    model = AutoModelForCausalLM.from_pretrained(awq_directory)

transformers has no entry points and refuses a second quantizer for "awq", so enable() puts ours in
the place of its own in AUTO_QUANTIZER_MAPPING; disable() puts that back. Which layers are 4-bit is
read from the headers of the checkpoint, not guessed from its config.
"""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from .errors import InvalidArgument, Unsupported
from .plan import ModelPlan, choose_plan, read_config
from .torch import AwqLinear

_LOG = logging.getLogger("nibble.transformers")
_SCALES = {"F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS = {**_SCALES, "F32": torch.float32}
_PARTS = ("qweight", "qzeros", "scales", "bias")

_options: dict = {"mode": None, "granularity": None}
_replaced: type | None = None


def enable(mode: str | None = None, granularity: str | None = None) -> None:
    """From now on AWQ checkpoints are loaded with Nibble's linears.

    mode: "w4a16", "w4a8", "w4a4", on a GPU also "w4a8-fp8"; "auto": the plan in config.json; None:
    that plan if there is one, else w4a8. granularity: "token", "group" or "tensor"; None: the
    default mix of `nibble generate`. Called again, it changes the options of models that are loaded
    later.
    """
    global _replaced
    choose_plan(mode if mode != "auto" else None, granularity, {})  # refuses wrong names now
    _options.update(mode=mode, granularity=granularity)
    if auto.AUTO_QUANTIZER_MAPPING["awq"] is not NibbleQuantizer:
        _replaced = auto.AUTO_QUANTIZER_MAPPING["awq"]
        auto.AUTO_QUANTIZER_MAPPING["awq"] = NibbleQuantizer


def disable() -> None:
    """Gives AWQ checkpoints back to transformers' own quantizer."""
    if auto.AUTO_QUANTIZER_MAPPING["awq"] is NibbleQuantizer:
        auto.AUTO_QUANTIZER_MAPPING["awq"] = _replaced


class NibbleQuantizer(HfQuantizer):
    """Swaps the linears that the checkpoint holds in 4 bits for AwqLinear, and packs them."""

    requires_calibration = True

    def __init__(self, quantization_config, **kwargs) -> None:
        super().__init__(quantization_config, **kwargs)
        self.options = dict(_options)

    def validate_environment(self, *args, **kwargs) -> None:
        layout = str(getattr(self.quantization_config, "format", "gemm")).lower()
        if self.quantization_config.bits != 4 or not layout.endswith("gemm"):
            raise Unsupported(f"quantization_config: expected 4 bits and version gemm, found "
                              f"{self.quantization_config.bits} bits and {layout}")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype  # any of float32, float16, bfloat16

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        stored = _quantized_layers(checkpoint_files)
        # AwqConfig drops the keys that it does not know, the plan among them: back to the file.
        plan = choose_plan(self.options["mode"], self.options["granularity"],
                           read_config(Path(checkpoint_files[0]).parent))
        modules = dict(model.named_modules())
        for name, parts in stored.items():
            place = _find(name, modules)
            linear = modules[place]
            try:
                layer = _make_layer(linear, parts, plan, place)
            except (InvalidArgument, KeyError) as error:
                raise InvalidArgument(f"{name}: {error}") from error
            parent, _, child = place.rpartition(".")
            setattr(modules[parent], child, layer)
        self.plan, self.count = plan, len(stored)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        kernels = 0
        for name, module in model.named_modules():
            if isinstance(module, AwqLinear):
                try:
                    module.pack()
                except InvalidArgument as error:
                    raise InvalidArgument(f"{name}: {error}") from error
                kernels += 1
        if kernels != self.count:
            raise InvalidArgument(f"{self.count} layers of the checkpoint are 4-bit, {kernels} of "
                                  "the model")
        _LOG.info("%d linears run with %s", kernels, self.plan)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return False  # the packed layout is this library's own; keep the AWQ directory

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _quantized_layers(files) -> dict[str, dict]:
    """{"model.layers.0.mlp.up_proj": {"qweight": header, ...}} of all safetensors files."""
    layers: dict[str, dict] = {}
    for path in files or ():
        if not str(path).endswith(".safetensors"):
            raise Unsupported(f"{path}: expected a .safetensors file")
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for key, entry in header.items():
            name, _, part = key.rpartition(".")
            if part in _PARTS:
                layers.setdefault(name, {})[part] = entry
    layers = {name: parts for name, parts in layers.items() if "qweight" in parts}
    if not layers:
        raise InvalidArgument("the checkpoint has no tensor named *.qweight: it is no AWQ "
                              "checkpoint of version gemm")
    return layers


def _find(name: str, modules: dict) -> str:
    """The module of a layer of the checkpoint; transformers may know it under a longer prefix."""
    tail = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    found = [name] if name in modules else [at for at in modules if at.endswith("." + tail)]
    if len(found) == 1 and isinstance(modules[found[0]], nn.Linear):
        return found[0]
    raise Unsupported(f"{name}.qweight: expected one linear layer of that name in the model, found "
                      f"{found or 'none'} (mixtures of experts are not supported)")


def _make_layer(linear: nn.Linear, parts: dict, plan: ModelPlan, name: str) -> AwqLinear:
    k, n = linear.in_features, linear.out_features
    if "scales" not in parts:
        raise InvalidArgument("scales: missing")
    groups = parts["scales"]["shape"][0]
    if groups < 1 or k % groups or parts["scales"]["dtype"] not in _SCALES:
        raise InvalidArgument(f"scales: expected F16 or BF16 (G, {n}), G a divisor of {k}, found "
                              f"{parts['scales']['dtype']} {parts['scales']['shape']}")
    expected = {"qweight": ("I32", [k, n // 8]), "qzeros": ("I32", [groups, n // 8]),
                "scales": (parts["scales"]["dtype"], [groups, n])}
    for part, (dtype, shape) in expected.items():
        found = parts.get(part)
        if found is not None and (found["dtype"], found["shape"]) != (dtype, shape):
            raise InvalidArgument(f"{part}: expected {dtype} {shape}, found {found['dtype']} "
                                  f"{found['shape']}")
    bias = parts.get("bias")
    if bias is not None and (bias["shape"] != [n] or bias["dtype"] not in _FLOATS):
        raise InvalidArgument(f"bias: expected F32, F16 or BF16 [{n}], found {bias['dtype']} "
                              f"{bias['shape']}")
    if linear.bias is not None and bias is None:
        raise InvalidArgument("bias: missing")
    return AwqLinear(k, n, bias is not None, group_size=k // groups,
                     zero_point="qzeros" in parts, mode=plan.spec(name), device="meta",
                     scale_dtype=_SCALES[parts["scales"]["dtype"]],
                     bias_dtype=_FLOATS[bias["dtype"]] if bias is not None else None)
