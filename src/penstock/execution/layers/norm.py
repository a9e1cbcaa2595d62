"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.rows import rms_norm
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import Weight


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight, over the last dimension."""

    def __init__(self, size: int, eps: float, options: LayerOptions) -> None:
        super().__init__()
        self.weight = Weight((size,), options)
        self.eps = eps
        self.shape = (size,)
        self.triton = options.triton

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """With `delta`, it is added to `x` first, in place."""
        if self.triton:
            from penstock.execution.kernels.triton.rows import add_rms_norm as fused_norm
            from penstock.execution.kernels.triton.rows import rms_norm as triton_norm

            if delta is None:
                return triton_norm(x, self.weight, self.eps)
            return fused_norm(x, delta, self.weight, self.eps)
        if delta is not None:
            x.add_(delta)
        if x.dtype == torch.float32 and x.device.type == "cpu" and native_available():
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.shape, self.weight, self.eps)
