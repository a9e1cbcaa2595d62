"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from penstock.execution.layers.activation import silu_and_mul
from penstock.execution.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from penstock.execution.layers.options import LayerOptions


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); x is [T, hidden_size]. Gate and up are one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool, options: LayerOptions) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, {"gate": intermediate_size, "up": intermediate_size}, bias=bias, options=options
        )
        self.triton = options.triton
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias=bias, options=options)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(silu_and_mul(self.gate_up_proj(x), triton=self.triton))
        return output
