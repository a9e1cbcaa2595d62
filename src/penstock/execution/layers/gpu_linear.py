"""Linear layers on a GPU: which product a weight gets, by the form that it is stored in.

    floats                          cuBLAS (PlainLinear)
    int8, int4, NF4                 weight-only kernels over the packed weight (TritonLinear)
      int4 in groups                or torch's own kernel, whichever is faster on this card (linear_choice.py)
    8-bit floats, scales per row    torch._scaled_mm above 16 tokens where the card has units, else weight-only (Float8Linear)
      scales per block              weight-only

Layers that are computed together (options.grouped: experts) take the weight-only kernels, whose form the grouped product reads.
Consecutive parts of one form become one weight, their codes side by side; parts of several forms are as many products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.execution.kernels.quantized import (
    CodebookTensor,
    CompactWeight,
    Float8Tensor,
    QuantizedTensor,
    StoredWeight,
)
from penstock.execution.kernels.torch_int4 import TorchInt4Linear, torch_int4_supports
from penstock.execution.kernels.triton import support
from penstock.execution.kernels.triton.fp8 import Float8Linear, units_multiply
from penstock.execution.kernels.triton.linear import TritonLinear
from penstock.execution.kernels.triton.linear_pack import can_pack, pack
from penstock.execution.layers.linear_choice import LinearChoices, LinearShape, cuda_seconds
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import float_copy

if TYPE_CHECKING:
    from penstock.execution.layers.linear import LinearKernel


@dataclass(frozen=True)
class SegmentedLinear:
    """Several products of one input, whose outputs lie side by side."""

    kernels: Sequence[LinearKernel]

    @property
    def nbytes(self) -> int:
        return sum(kernel.nbytes for kernel in self.kernels)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([kernel(x) for kernel in self.kernels], dim=-1)


def gpu_linear_kernel(
    parts: Sequence[StoredWeight],
    bias: Tensor | None,
    options: LayerOptions,
    choices: LinearChoices | None = None,
) -> LinearKernel:
    """The fastest kernel for weights [N_i, K] whose outputs lie side by side, and their bias [sum N_i], all moved to `options.device`."""
    choices = choices or _device_choices(options.device)
    kernels: list[LinearKernel] = []
    start = 0
    for segment in _segments([_on_device(part, options) for part in parts]):
        stop = start + segment.shape[0]
        segment_bias = None if bias is None else bias[start:stop].to(options.device, options.dtype)
        kernels.append(_segment_kernel(segment, segment_bias, options, choices))
        start = stop
    return kernels[0] if len(kernels) == 1 else SegmentedLinear(kernels)


def lookup_kernel(weight: CompactWeight, options: LayerOptions) -> TritonLinear | Float8Linear | None:
    """A kernel for one weight of which rows can be looked up as well; None when the weight can only be had as floats."""
    return _triton_kernel(_compact_on_device(weight, options.device), None, options) if can_pack(weight) else None


def _segment_kernel(
    weight: StoredWeight, bias: Tensor | None, options: LayerOptions, choices: LinearChoices
) -> LinearKernel:
    from penstock.execution.layers.linear import PlainLinear

    if isinstance(weight, Tensor):
        return PlainLinear(weight, bias)
    if not can_pack(weight):
        return PlainLinear(float_copy(weight, options.dtype), bias)
    if options.grouped:
        return TritonLinear(pack(weight, options.device), bias)
    candidates: dict[str, Callable[[], LinearKernel]] = {"penstock": lambda: _triton_kernel(weight, bias, options)}
    if isinstance(weight, QuantizedTensor) and torch_int4_supports(weight, options.device, options.dtype):
        candidates["torch"] = lambda: TorchInt4Linear(weight, bias, options.device, options.dtype)
    group = weight.group_size if not isinstance(weight, Float8Tensor) else weight.block[1]
    return choices.choose(LinearShape(*weight.shape, group, options.dtype, options.device), candidates)


def _triton_kernel(weight: CompactWeight, bias: Tensor | None, options: LayerOptions) -> TritonLinear | Float8Linear:
    packed = pack(weight, options.device)
    if isinstance(weight, Float8Tensor) and units_multiply(packed, options.device):
        return Float8Linear(packed, bias, weight.activation_scale)
    return TritonLinear(packed, bias)


@cache
def _device_choices(device: torch.device) -> LinearChoices:
    """Nothing is timed where kernels are interpreted."""
    return LinearChoices(cuda_seconds if device.type == "cuda" and not support.interpreted() else None)


def _on_device(part: StoredWeight, options: LayerOptions) -> StoredWeight:
    """The part with its tensors on the device, floats in the type of activations, 8-bit floats with a scale for each row or block."""
    device = options.device
    if isinstance(part, Tensor):
        return part.to(device, options.dtype)
    return _compact_on_device(part, device)


def _compact_on_device(part: CompactWeight, device: torch.device) -> CompactWeight:
    if isinstance(part, Float8Tensor):
        rows, columns = part.shape
        scales = part.scales.to(device)
        if part.block[1] < columns:
            return replace(part, codes=part.codes.to(device), scales=scales)
        by_row = scales.repeat_interleave(part.block[0], 0)[:rows]
        return replace(part, codes=part.codes.to(device), block=(1, columns), scales=by_row)
    if isinstance(part, CodebookTensor):
        return replace(
            part, codes=part.codes.to(device), codebook=part.codebook.to(device), scales=part.scales.to(device)
        )
    return replace(
        part,
        codes=part.codes.to(device),
        scales=part.scales.to(device),
        offsets=None if part.offsets is None else part.offsets.to(device),
        input_order=None if part.input_order is None else part.input_order.to(device),
    )


def _segments(parts: Sequence[StoredWeight]) -> list[StoredWeight]:
    """The parts, with consecutive ones of one form joined."""
    segments: list[list[StoredWeight]] = []
    for part in parts:
        if segments and _joinable(segments[-1][-1], part):
            segments[-1].append(part)
        else:
            segments.append([part])
    return [_joined(run) for run in segments]


def _joinable(one: StoredWeight, other: StoredWeight) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor)
    if isinstance(one, Float8Tensor) and isinstance(other, Float8Tensor):
        whole_blocks = one.shape[0] % one.block[0] == 0
        fixed = (one.activation_scale is None) == (other.activation_scale is None)
        return one.block == other.block and whole_blocks and fixed
    if isinstance(one, CodebookTensor) and isinstance(other, CodebookTensor):
        return one.group_size == other.group_size and torch.equal(one.codebook, other.codebook)
    if not isinstance(one, QuantizedTensor) or not isinstance(other, QuantizedTensor):
        return False
    if (one.bits, one.group_size, one.offsets is None) != (other.bits, other.group_size, other.offsets is None):
        return False
    if one.input_order is None or other.input_order is None:
        return one.input_order is other.input_order
    return torch.equal(one.input_order, other.input_order)


def _joined(parts: Sequence[StoredWeight]) -> StoredWeight:
    """Parts of which each can be joined with the next."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    compact = [part for part in parts if not isinstance(part, Tensor)]
    codes, scales = torch.cat([part.codes for part in compact]), torch.cat([part.scales for part in compact])
    if isinstance(first, Float8Tensor):
        # One input has one scale: the largest, which leaves no layer's input out of range.
        fixed = [part.activation_scale for part in compact if isinstance(part, Float8Tensor) and part.activation_scale]
        return replace(first, codes=codes, scales=scales, activation_scale=max(fixed) if fixed else None)
    if isinstance(first, CodebookTensor):
        return replace(first, codes=codes, scales=scales)
    offsets = [part.offsets for part in compact if isinstance(part, QuantizedTensor) and part.offsets is not None]
    return replace(first, codes=codes, scales=scales, offsets=torch.cat(offsets) if offsets else None)
