"""One linear layer of a rank, as vLLM drives it: create_weights makes parameters of the layout of
the checkpoint, vLLM fills them, process_weights_after_loading repacks them for the kernels, apply
multiplies. Fused layers (qkv, gate_up) are one weight: columns do not see each other.

Tensor parallelism cuts a row-parallel weight along K. The cut may fall inside a quantization group:
then both ranks load that group's scales and zeros, and `pack_awq` is told where the first group
began.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

from nibble._shards import groups_met, shard_group_size
from nibble.errors import NibbleError
from nibble.modes import Granularity, Spec
from nibble.torch import pack_awq
from nibble.vllm.device import all_cpus, log_kernels
from nibble.vllm.ops import linear_or_nan

if TYPE_CHECKING:
    from nibble.vllm.config import NibbleConfig

CODES_PER_WORD = 8


class _GroupRows:
    """A parameter with one row per group, of which a row-parallel rank loads those that its rows of
    the weight touch: vLLM would take rank * count rows from the start, which is wrong where groups
    straddle ranks. Refuses to convert what it loads."""

    first_group = 0

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        rows = self.data.shape[self.input_dim]
        self._copy(loaded_weight.narrow(self.input_dim, self.first_group, rows))

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._check_dtype(loaded_weight)
        super().load_column_parallel_weight(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._check_dtype(loaded_weight)
        super().load_merged_column_weight(loaded_weight, **kwargs)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._check_dtype(loaded_weight)
        super().load_qkv_weight(loaded_weight, **kwargs)

    def _copy(self, part: torch.Tensor) -> None:
        self._check_dtype(part)
        if part.shape != self.data.shape:
            raise ValueError(f"{self.label}: expected shape {tuple(self.data.shape)} on rank "
                             f"{self.tp_rank}, found {tuple(part.shape)}")
        self.data.copy_(part)

    def _check_dtype(self, loaded_weight: torch.Tensor) -> None:
        if loaded_weight.dtype != self.data.dtype:
            raise ValueError(f"{self.label}: expected {self.data.dtype}, found "
                             f"{loaded_weight.dtype}")


class GroupZeros(_GroupRows, PackedvLLMParameter):
    """qzeros: (groups, N / 8) int32."""


class GroupScales(_GroupRows, GroupQuantScaleParameter):
    """scales: (groups, N), of the type they have in the file."""


def shard_values(values: tuple, k_offset: int, k: int, group_size: int, size: int) -> tuple:
    """Of values per group of the whole weight, those per group of a shard, whose groups are of
    `size` rows."""
    return tuple(values[row // group_size] for row in range(k_offset, k_offset + k, size))


@register_weight_loader_v2_supported_method
class NibbleLinearMethod(LinearMethodBase):
    """A linear layer in 4 bits, run as its spec says."""

    def __init__(self, config: NibbleConfig, prefix: str, spec: Spec):
        self.config = config
        self.prefix = prefix
        self.spec = spec

    def create_weights(self, layer: torch.nn.Module, input_size_per_partition: int,
                       output_partition_sizes: list[int], input_size: int, output_size: int,
                       params_dtype: torch.dtype, **extra_weight_attrs: Any) -> None:
        k, n = input_size_per_partition, sum(output_partition_sizes)
        group_size = self.config.group_size if self.config.group_size != -1 else input_size
        if input_size % group_size != 0:
            raise ValueError(f"nibble: {self.prefix}: expected a multiple of the group size "
                             f"{group_size} as input channels, found {input_size}")
        for size in output_partition_sizes:
            if size % CODES_PER_WORD != 0:
                raise ValueError(f"nibble: {self.prefix}: expected a multiple of {CODES_PER_WORD} "
                                 f"output channels on each rank, found {size}")
        self._check_spec(input_size, group_size)
        k_offset = layer.tp_rank * k if k < input_size else 0
        try:
            layer.nibble_group_size = shard_group_size(group_size, k_offset, k)
        except NibbleError as error:
            raise ValueError(f"nibble: {self.prefix} on rank {layer.tp_rank}: {error}") from None
        layer.nibble_file_group_size, layer.nibble_k_offset = group_size, k_offset
        groups = groups_met(group_size, k_offset, k)

        loader = extra_weight_attrs["weight_loader"]
        packed = {"input_dim": 0, "output_dim": 1, "packed_dim": 1,
                  "packed_factor": CODES_PER_WORD, "weight_loader": loader}
        words = n // CODES_PER_WORD
        parameters = {
            "qweight": PackedvLLMParameter(data=torch.empty(k, words, dtype=torch.int32), **packed),
            "qzeros": GroupZeros(data=torch.empty(groups, words, dtype=torch.int32), **packed),
            "scales": GroupScales(data=torch.empty(groups, n, dtype=self.config.scale_dtype),
                                  input_dim=0, output_dim=1, weight_loader=loader),
        }
        for name, parameter in parameters.items():
            parameter.label = f"nibble: {self.prefix}.{name}"
            parameter.first_group = k_offset // group_size
            layer.register_parameter(name, parameter)

    def _check_spec(self, k: int, group_size: int) -> None:
        spec, groups = self.spec, k // group_size
        static = spec.granularity == Granularity.STATIC_GROUP
        for key, values, needed in (("static_scales", spec.static_scales, static),
                                    ("wide_groups", spec.wide_groups, bool(spec.wide_groups))):
            if needed and len(values) != groups:
                raise ValueError(f"nibble: {self.prefix}: {key} of the plan in config.json: "
                                 f"expected {groups}, one per group, found {len(values)}")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        # On a row-parallel layer vLLM adds the bias on the first rank only. Packed, it is added in
        # fp32 before y is rounded.
        bias = layer.bias
        if layer.skip_bias_add or (isinstance(layer, RowParallelLinear) and layer.tp_rank > 0):
            bias = None
        k, n = layer.qweight.shape[0], layer.scales.shape[1]
        file_group, offset = layer.nibble_file_group_size, layer.nibble_k_offset
        size, spec = layer.nibble_group_size, self.spec
        try:
            with all_cpus():
                packed = pack_awq(layer.qweight.data, layer.qzeros.data, layer.scales.data,
                                  file_group, bias=None if bias is None else bias.data,
                                  k_offset=offset)
            log_kernels(spec, n, k, size, layer.params_dtype)
        except NibbleError as error:
            raise ValueError(f"nibble: {self.prefix}: {error}") from error
        for name in ("qweight", "qzeros", "scales"):
            delattr(layer, name)
        layer.nibble_weight = Parameter(packed, requires_grad=False)
        layer.nibble_has_bias = bias is not None
        layer.nibble_arguments = (n, size, int(spec.product_mode), int(spec.granularity),
                                  spec.symmetric, spec.clip)
        scales = spec.static_scales
        if spec.granularity == Granularity.STATIC_GROUP:
            scales = shard_values(scales, offset, k, file_group, size)
        wide = shard_values(spec.wide_groups, offset, k, file_group, size) \
            if any(spec.wide_groups) else ()
        for name, values, dtype in (("nibble_static_scales", scales, torch.float32),
                                    ("nibble_wide_groups", wide, torch.uint8)):
            tensor = torch.tensor(values, dtype=dtype, device=packed.device) if values else None
            layer.register_buffer(name, tensor, persistent=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor,
              bias: torch.Tensor | None = None) -> torch.Tensor:
        if (bias is not None) != layer.nibble_has_bias:
            raise ValueError(f"nibble: {self.prefix}: expected a call "
                             f"{'with' if layer.nibble_has_bias else 'without'} its bias")
        return linear_or_nan(x, layer.nibble_weight, *layer.nibble_arguments,
                             layer.nibble_static_scales, layer.nibble_wide_groups)
