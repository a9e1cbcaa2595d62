"""A parameter that knows which parts of it come from which tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from penstock.execution.layers.options import LayerOptions


class Weight(nn.Parameter):
    """Uninitialised memory for one weight or bias.

    `shards` maps a shard's name to its rows [start, end) when several checkpoint tensors lie one after the other in this one,
    such as q, k and v; empty when the parameter is one tensor of the checkpoint.
    """

    shards: Mapping[str, tuple[int, int]]

    def __new__(
        cls, shape: tuple[int, ...], options: LayerOptions, shards: Mapping[str, tuple[int, int]] | None = None
    ) -> Self:
        data = torch.empty(shape, dtype=options.dtype, device=options.device)
        weight = super().__new__(cls, data, requires_grad=False)
        weight.shards = shards or {}
        return weight

    def target(self, shard: str | None) -> Tensor:
        """The part that a checkpoint's tensor fills: `shard`, or all of it for None. Raises KeyError for a shard it has not."""
        if shard is None:
            return self.data
        start, end = self.shards[shard]
        return self.data[start:end]
