"""Gated activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.kernels import rows
from penstock.execution.kernels.native import native_available


def silu_and_mul(gate_up: Tensor, *, triton: bool = False) -> Tensor:
    """[T, 2 * I], the gate's half first → silu(gate) * up, [T, I] (SwiGLU: Shazeer, 2020, arXiv:2002.05202)."""
    if triton:
        from penstock.execution.kernels.triton.rows import silu_and_mul as triton_silu

        return triton_silu(gate_up)
    if gate_up.dtype == torch.float32 and gate_up.device.type == "cpu" and native_available():
        return rows.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
