"""Linear layers on a GPU: which product a weight gets, by the form that it is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.execution.kernels.quantized import StoredWeight
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import as_float

if TYPE_CHECKING:
    from penstock.execution.layers.linear import LinearKernel


def gpu_linear_kernel(parts: Sequence[StoredWeight], bias: Tensor | None, options: LayerOptions) -> LinearKernel:
    """The fastest kernel for weights [N_i, K] whose outputs lie side by side, and their bias [sum N_i]."""
    from penstock.execution.layers.linear import PlainLinear

    weight = torch.cat([as_float(part).to(options.device, options.dtype) for part in parts])
    return PlainLinear(weight, None if bias is None else bias.to(options.device, options.dtype))
