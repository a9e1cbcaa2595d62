"""Gated activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * I], the gate's half first → silu(gate) * up, [T, I] (SwiGLU: Shazeer, 2020, arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
