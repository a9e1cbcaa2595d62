"""All experts of a layer on a GPU: routing, order, two grouped products around the activation, and the weighted sum; seven launches.

Twins: kernels.moe.route and kernels.moe.experts_twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.moe import Routing
from penstock.execution.kernels.triton.moe_gemm import GroupedWeight, block_rows, grouped_product
from penstock.execution.kernels.triton.moe_routing import arrange, mix, route
from penstock.execution.kernels.triton.rows import silu_and_mul


class GroupedExperts:
    """`present` consecutive experts of a layer, from number `first` on. gate_up: [2 * I, H] of each, down: [H, I]."""

    def __init__(self, routing: Routing, first: int, present: int, gate_up: GroupedWeight, down: GroupedWeight) -> None:
        if gate_up.in_features != down.out_features or gate_up.out_features != 2 * down.in_features:
            raise IntegrityError("an expert's down takes what its gate_up gives, and gives what that takes")
        self._routing, self._first, self._present = routing, first, present
        self._gate_up, self._down = gate_up, down

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        """x [T, H] and the router's logits [T, E] → [T, H] in the type of x."""
        if len(x) == 0:
            return torch.empty_like(x)
        x = x.contiguous()
        weights, chosen = route(logits, self._routing)
        pairs = chosen.numel()
        rows = block_rows(pairs, self._routing.num_experts, x.dtype, x.device)
        arrangement = arrange(chosen, self._first, self._present, rows)
        # Rows of experts that are elsewhere are never used, but they go through the activation, so they are numbers.
        new = x.new_empty if self._present == self._routing.num_experts else x.new_zeros
        gate_up = new((pairs, self._gate_up.out_features))
        grouped_product(x, self._gate_up, arrangement, gate_up, self._routing.per_token)
        results = x.new_empty(pairs, self._down.out_features)
        grouped_product(silu_and_mul(gate_up), self._down, arrangement, results, 1)
        return mix(results, weights, chosen, self._first, self._present)
