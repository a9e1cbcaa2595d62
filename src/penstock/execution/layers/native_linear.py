"""Linear layers of the native CPU kernels: which of their weights a stored weight becomes.

Floats and integers keep the precision that they have; 8-bit floats and codebooks, with which no native kernel computes, become floats.
Consecutive parts of one kind become one weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from penstock.execution.kernels.linear import MAX_SEGMENTS, NativeLinear, PackedWeight, pack_float, pack_quantized
from penstock.execution.kernels.quantized import QuantizedTensor, StoredWeight
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import as_float, float_copy

# Input features that share a scale: a multiple of this.
_SMALLEST_GROUP = 16


def native_linear_kernel(parts: Sequence[StoredWeight], bias: Tensor | None, options: LayerOptions) -> NativeLinear:
    """One native layer of weights [N_i, K] whose outputs lie side by side, and their bias [sum N_i]."""
    segments = list(_segments([_computable(part, options) for part in parts]))
    if len(segments) > MAX_SEGMENTS:
        segments = [joined([as_float(part).to(torch.float32) for part in segments])]
    packed, start = [], 0
    for segment in segments:
        stop = start + segment.shape[0]
        packed.append(_pack(segment, None if bias is None else bias[start:stop].to(torch.float32)))
        start = stop
    return NativeLinear(packed, bf16_arithmetic=options.bf16_arithmetic)


def _pack(weight: Tensor | QuantizedTensor, bias: Tensor | None) -> PackedWeight:
    return pack_quantized(weight, bias) if isinstance(weight, QuantizedTensor) else pack_float(weight, bias)


def _computable(part: StoredWeight, options: LayerOptions) -> Tensor | QuantizedTensor:
    """The part as native kernels can compute with it; the same numbers, unless options ask for another float type."""
    if isinstance(part, Tensor):
        return part if options.weight_dtype is None else part.to(options.weight_dtype)
    if not isinstance(part, QuantizedTensor):
        # No native kernel computes with 8-bit floats or codebooks, and integers would round them again.
        return float_copy(part, options.widened_dtype)
    # Kernels have offsets with groups only, so that one offset per output feature is spread over groups, for which there must be a size.
    rowwise = part.offsets is not None and part.group_size == part.shape[1]
    return part.dequantize() if rowwise and part.shape[1] % _SMALLEST_GROUP else part


def _segments(parts: Sequence[Tensor | QuantizedTensor]) -> Iterator[Tensor | QuantizedTensor]:
    """The parts, with consecutive ones of one kind joined."""
    start = 0
    for stop in range(1, len(parts) + 1):
        if stop == len(parts) or not _joinable(parts[start], parts[stop]):
            run = parts[start:stop]
            floats = [part for part in run if isinstance(part, Tensor)]
            yield joined(floats) if floats else _joined_quantized([p for p in run if isinstance(p, QuantizedTensor)])
            start = stop


def _joinable(one: Tensor | QuantizedTensor, other: Tensor | QuantizedTensor) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
    if (one.bits, one.group_size, one.offsets is None) != (other.bits, other.group_size, other.offsets is None):
        return False
    if one.input_order is None or other.input_order is None:
        return one.input_order is other.input_order
    return torch.equal(one.input_order, other.input_order)


def _joined_quantized(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    first = parts[0]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return QuantizedTensor(
        joined([part.codes for part in parts]),
        first.bits,
        first.group_size,
        joined([part.scales for part in parts]),
        joined(offsets) if offsets else None,
        first.input_order,
    )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The tensors one below the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
