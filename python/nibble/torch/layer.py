"""AwqLinear: torch.nn.Linear with the weight of an AWQ checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InvalidArgument
from ..modes import Spec, make_spec
from .packing import pack_awq


class AwqLinear(nn.Module):
    """y = x W (+ bias) with 4-bit weights. For inference.

    Made empty, with the buffers of an AWQ checkpoint (qweight int32 (K, N/8), qzeros int32
    (G, N/8), scales (G, N), bias (N)), so that a state dict can be loaded into it; pack() turns
    these into one buffer `packed`, once, and lets go of them. Or from_tensors().

    mode: "w4a16", "w4a8", "w4a4", on a GPU also "w4a8-fp8", or a nibble.Spec; options as in
    nibble.make_spec.
    """

    packed: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *,
                 group_size: int = 128, zero_point: bool = True, mode: str | Spec = "w4a8",
                 scale_dtype: torch.dtype = torch.float16, bias_dtype: torch.dtype | None = None,
                 device=None, **options) -> None:
        super().__init__()
        group_size = in_features if group_size == -1 else group_size
        if in_features < 1 or out_features < 1 or out_features % 8:
            raise InvalidArgument(f"out_features: expected a positive multiple of 8 (and "
                                  f"in_features > 0), found {out_features} and {in_features}")
        if group_size < 1 or in_features % group_size:
            raise InvalidArgument(f"group_size: {group_size} does not divide in_features="
                                  f"{in_features}")
        self.in_features, self.out_features = in_features, out_features
        self.group_size = group_size
        groups, words = in_features // group_size, out_features // 8

        def buffer(name: str, shape: tuple, dtype: torch.dtype, wanted: bool = True) -> None:
            empty = torch.empty(shape, dtype=dtype, device=device) if wanted else None
            self.register_buffer(name, empty)

        buffer("qweight", (in_features, words), torch.int32)
        buffer("qzeros", (groups, words), torch.int32, zero_point)
        buffer("scales", (groups, out_features), scale_dtype)
        buffer("bias", (out_features,), bias_dtype or scale_dtype, bias)
        self.register_buffer("packed", None)
        self.set_mode(mode, **options)

    @classmethod
    def from_tensors(cls, qweight, qzeros, scales, group_size: int, bias=None,
                     mode: str | Spec = "w4a8", **options) -> AwqLinear:
        """A packed layer of the tensors of a checkpoint; see pack_awq."""
        packed = pack_awq(qweight, qzeros, scales, group_size, bias)
        layer = cls(qweight.shape[0], qweight.shape[1] * 8, group_size=group_size, mode=mode,
                    device="meta", **options)
        layer._take(packed)
        return layer

    def set_mode(self, mode: str | Spec, **options) -> None:
        """Changes how activations are treated; the weight stays as it is."""
        spec = make_spec(mode, **options)
        groups = self.in_features // self.group_size
        wanted = 1 if spec.granularity_name == "static-tensor" else groups
        if spec.static_scales and len(spec.static_scales) != wanted:
            raise InvalidArgument(f"static_scales: expected {wanted}, found "
                                  f"{len(spec.static_scales)}")
        if spec.wide_groups and len(spec.wide_groups) != groups:
            raise InvalidArgument(f"wide_groups: expected {groups} flags, found "
                                  f"{len(spec.wide_groups)}")
        self.spec = spec
        self._place()
        self._arguments = (self.out_features, self.group_size, int(spec.product_mode),
                           int(spec.granularity), spec.symmetric, spec.clip)

    def pack(self) -> None:
        """Packs the loaded tensors and frees them. Nothing happens the second time."""
        if self.packed is None:
            self._take(pack_awq(self.qweight, self.qzeros, self.scales, self.group_size, self.bias))

    def _take(self, packed: torch.Tensor) -> None:
        self.qweight = self.qzeros = self.scales = self.bias = None
        self.packed = packed
        self._place()

    def _place(self) -> None:
        """The spec's arrays as tensors beside the weight. They are no buffers: a change of the
        model's dtype would round them."""
        static = wide = None
        if self.packed is not None:
            device = self.packed.device
            if self.spec.static_scales:
                static = torch.tensor(self.spec.static_scales, dtype=torch.float32, device=device)
            if any(self.spec.wide_groups):
                wide = torch.tensor(self.spec.wide_groups, dtype=torch.uint8, device=device)
        self.static_scales, self.wide_groups = static, wide

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            raise InvalidArgument("AwqLinear: pack() has not been called since it was loaded")
        if x.shape[-1] != self.in_features:
            raise InvalidArgument(f"x: expected (..., {self.in_features}), found {list(x.shape)}")
        if x.stride(-1) != 1:
            x = x.contiguous()
        return torch.ops.nibble.linear(x, self.packed, *self._arguments, self.static_scales,
                                       self.wide_groups)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"group_size={self.group_size}, {self.spec}")
