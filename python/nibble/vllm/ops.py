"""The operator that vLLM calls: torch.ops.nibble.linear, except that a row of x with a NaN or an
infinity makes its row of y NaN, as on GPUs, instead of raising. vLLM measures itself with batches
whose attention is left uninitialized, and an exception would end the engine with all its requests.
"""

from __future__ import annotations

import torch

from nibble.errors import NonFinite
from nibble.modes import Granularity
from nibble.torch.ops import _HOW, _TAGS, _linear_cpu, _linear_fake

_library = torch.library.Library("nibble", "FRAGMENT")
_library.define("linear_or_nan(Tensor x, Tensor packed, int n, int group_size, int mode, "
                f"int granularity, {_HOW}) -> Tensor", tags=_TAGS)


def _linear_or_nan_cpu(x, packed, n, group_size, mode, granularity, *how):
    try:
        return _linear_cpu(x, packed, n, group_size, mode, granularity, *how)
    except NonFinite:
        finite = x.isfinite().all(dim=-1, keepdim=True)
        if granularity == Granularity.TENSOR:  # one scale for all rows
            finite = finite.all().expand_as(finite)
        y = _linear_cpu(x.masked_fill(~finite, 0), packed, n, group_size, mode, granularity, *how)
        return y.masked_fill_(~finite, float("nan"))


_library.impl("linear_or_nan", _linear_or_nan_cpu, "CPU")
torch.library.register_fake("nibble::linear_or_nan", _linear_fake, lib=_library)
linear_or_nan = torch.ops.nibble.linear_or_nan
