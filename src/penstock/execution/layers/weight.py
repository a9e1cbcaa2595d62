"""How the numbers of a checkpoint get into a layer: small parameters have memory from the start, large weights are handed over whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.quantized import CompactWeight, Float8Tensor, StoredWeight
from penstock.execution.layers.options import LayerOptions
from penstock.execution.parallel.sharding import WHOLE, Shard

# What a tensor is for, which decides how it may be rounded: the weight of a linear layer, that of the output head (also when it is the
# embedding's table too), a table that is only looked up in, what chooses a token's experts, or a norm or bias.
SlotRole = Literal["linear", "head", "table", "router", "vector"]

# Numbers that are float32 for a moment while a weight is converted.
_CONVERTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Slot:
    """A place in a layer that one tensor of a checkpoint fills, or a part of it; only matrices may be quantised.

    shape: the whole tensor's, as the checkpoint has it. shard: the part of it that this process holds; `fill` takes a tensor of that part's
    shape.
    """

    shape: tuple[int, ...]
    role: SlotRole
    fill: Callable[[StoredWeight], None]
    shard: Shard = WHOLE


# (name of the parameter, shard) → its slot. A shard is None where one tensor is all of the parameter.
Slots = Mapping[tuple[str, str | None], Slot]


@runtime_checkable
class WeightHolder(Protocol):
    """A layer that takes its weights through slots and has no memory for them before.

    native_weight: what it holds in the layout of the native kernels, which can be kept on disk; None before it is loaded and where it
    holds nothing of the kind. take_native: receives such a weight instead of tensors for its slots.
    """

    def slots(self) -> Slots: ...

    @property
    def native_weight(self) -> NativeLinear | None: ...

    def take_native(self, weight: NativeLinear) -> None: ...


class Weight(nn.Parameter):
    """Uninitialised memory for one small parameter, in the type of activations; what a checkpoint has is converted to it."""

    def __new__(cls, shape: tuple[int, ...], options: LayerOptions) -> Self:
        data = torch.empty(shape, dtype=options.dtype, device=options.device)
        return super().__new__(cls, data, requires_grad=False)

    def slot(self) -> Slot:
        """The place for the one tensor that fills it."""
        return Slot(tuple(self.shape), "vector", self._fill)

    def _fill(self, value: StoredWeight) -> None:
        self.data.copy_(as_float(value))


def as_float(value: StoredWeight) -> Tensor:
    """A float tensor as it is; float32 of a quantised one."""
    return value if isinstance(value, Tensor) else value.dequantize()


def float_copy(value: CompactWeight, dtype: torch.dtype) -> Tensor:
    """A quantised weight [N, K] in `dtype`. Needs little memory besides the result, because rows are converted some at a time."""
    rows, columns = value.shape
    result = torch.empty(rows, columns, dtype=dtype, device=value.codes.device)
    step = max(1, _CONVERTED_AT_ONCE // columns)
    if isinstance(value, Float8Tensor) and value.block[0] < rows:
        step = -(-step // value.block[0]) * value.block[0]
    for start in range(0, rows, step):
        result[start : start + step] = value.rows(start, min(rows, start + step)).dequantize()
    return result
