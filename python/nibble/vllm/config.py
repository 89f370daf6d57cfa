"""Which checkpoints and layers are Nibble's, and how each layer is run: vLLM's QuantizationConfig.

The order of vLLM's calls: override_quantization_method (is this checkpoint ours?), from_config (its
quantization_config), maybe_update_config (its directory), apply_vllm_mapper (names of the model in
vLLM), get_quant_method (once per layer). The object is pickled to worker processes: plain values
only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.transformers_utils.config import get_safetensors_params_metadata

from nibble.errors import InvalidArgument
from nibble.modes import Mode, Spec
from nibble.plan import choose_plan
from nibble.vllm.device import check_device

NAME = "nibble"
OWN_PATH = "--quantization awq runs it by vLLM's own means"
OPTIONS = ("mode", "granularity")
SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


class NibbleConfig(QuantizationConfig):
    """What is known of one AWQ checkpoint."""

    def __init__(self, group_size: int, quantization_config: dict[str, Any], skipped: list[str]):
        super().__init__()
        self.group_size = group_size  # -1: all of K
        self.quantization_config = quantization_config
        # Names of modules, or parts of names, that are not quantized: what config.json says, until
        # the tensors of the files are known.
        self.skipped = skipped
        self.scale_dtype = torch.float16  # as in the file, whatever the model's dtype

    # ---- what vLLM asks of every method ---------------------------------------------------------

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quant_config.json", "quantize_config.json"]

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None,
                                     hf_config: Any = None) -> str | None:
        """NAME for a 4-bit AWQ checkpoint, unless the user asked for another method. A checkpoint
        that is claimed is run by Nibble or refused, so the library is loaded here."""
        bits = hf_quant_cfg.get("bits", hf_quant_cfg.get("w_bit"))
        method = str(hf_quant_cfg.get("quant_method", "")).lower()
        if user_quant not in (None, NAME) or method != "awq" or bits != 4:
            return None
        check_device()
        return NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NibbleConfig:
        bits = cls.get_from_keys(config, ["bits", "w_bit"])
        version = str(cls.get_from_keys_or(config, ["version", "format"], "gemm")).lower()
        group_size = cls.get_from_keys(config, ["group_size", "q_group_size"])
        if bits != 4:
            raise ValueError(f"nibble: quantization_config.bits: expected 4, found {bits}")
        if version != "gemm":
            raise ValueError(f'nibble: quantization_config.version: expected "gemm", found '
                             f"{json.dumps(version)}")
        if not isinstance(group_size, int) or (group_size != -1 and group_size <= 0):
            raise ValueError("nibble: quantization_config.group_size: expected -1 or a positive "
                             f"integer, found {group_size!r}")
        skipped = cls.get_from_keys_or(config, ["modules_to_not_convert"], None)
        return cls(group_size, config, list(skipped or []))

    def maybe_update_config(self, model_name: str, hf_config: Any = None,
                            revision: str | None = None) -> None:
        """Takes from the checkpoint what its config need not say: which modules have no qweight,
        and the type of the scales."""
        tensors = get_safetensors_params_metadata(model_name, revision=revision)
        modules: dict[str, set[str]] = {}
        for name in tensors:
            module, _, leaf = name.rpartition(".")
            modules.setdefault(module, set()).add(leaf)
        if modules:
            self.skipped = sorted(module for module, leaves in modules.items()
                                  if "weight" in leaves and "qweight" not in leaves)
        tied = getattr(hf_config, "tie_word_embeddings", False)
        for module, leaves in modules.items():
            if module.split(".")[-1] == "lm_head" and "qweight" in leaves and not tied:
                raise ValueError(f"nibble: {module}: a quantized lm_head is not supported; "
                                 f"{OWN_PATH}")
        dtypes = {info["dtype"] for name, info in tensors.items() if name.endswith(".scales")}
        if len(dtypes) > 1 or not dtypes <= set(SCALE_DTYPES):
            raise ValueError(f"nibble: {model_name}: scales: expected all F16 or all BF16, found "
                             f"{', '.join(sorted(dtypes))}")
        for dtype in dtypes:
            self.scale_dtype = SCALE_DTYPES[dtype]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.skipped = hf_to_vllm_mapper.apply_list(self.skipped)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        from nibble.vllm.linear import NibbleLinearMethod

        if isinstance(layer, LinearBase):
            if is_layer_skipped(prefix, self.skipped, self.packed_modules_mapping,
                                match_mode="substring"):
                return UnquantizedLinearMethod()
            return NibbleLinearMethod(self, prefix, self.spec_of(prefix))
        if isinstance(layer, RoutedExperts):
            raise ValueError(f"nibble: {prefix}: mixtures of experts are not supported; {OWN_PATH}")
        return None  # attention, embeddings, lm_head: vLLM's own

    # ---- modes ----------------------------------------------------------------------------------

    def spec_of(self, prefix: str) -> Spec:
        """How the linear of this name is run: by --additional-config, else by the checkpoint's
        plan, else in w4a8, as the command-line tool does."""
        options = read_options(get_current_vllm_config().additional_config)
        try:
            plan = choose_plan(options.get("mode"), options.get("granularity"),
                               self.quantization_config)
            spec = plan.spec(prefix)
            if spec.mode == Mode.W4A8_FP8:
                raise InvalidArgument("mode: w4a8-fp8 runs on CUDA devices, and the plugin on CPUs "
                                      "only; expected w4a16, w4a8 or w4a4")
            return spec
        except InvalidArgument as error:
            raise ValueError(f"nibble: {error} (additional_config.nibble is {options})") from None


def read_options(additional_config: Any) -> dict[str, str]:
    """The "nibble" part of --additional-config: "mode" and "granularity", both optional."""
    where = "nibble: additional_config.nibble"
    if not isinstance(additional_config, Mapping) or "nibble" not in additional_config:
        return {}
    options = additional_config["nibble"]
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: expected an object, found {json.dumps(options, default=repr)}")
    for key in options:
        if key not in OPTIONS:
            raise ValueError(f"{where}: unknown key {json.dumps(key)}; known are "
                             f"{', '.join(OPTIONS)}")
    return dict(options)
