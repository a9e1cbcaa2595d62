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

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and x.device.type == "cpu" and native_available():
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.shape, self.weight, self.eps)
