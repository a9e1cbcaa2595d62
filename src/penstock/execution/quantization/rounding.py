"""Rounds float weights to 8 or 4 bits while they are loaded, without calibration data.

    int8   one scale per output feature, symmetric: the largest magnitude becomes 127
    int4   a scale per group of input features, symmetric around code 8: values -8 … 7

A group of int4 is rounded with several scales, from one that just holds its largest magnitude to one that clips it to four fifths. Each
rounding gets the scale that fits it best in the sense of least squares, and the best of them wins, as in llama.cpp's make_qx_quants
(https://github.com/ggml-org/llama.cpp, ggml-quants.c): for integers q of weights w, the scale is Σwq / Σq² and the squared error
Σw² - (Σwq)² / Σq².
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.execution.kernels.quantized import CompactWeight, QuantizedTensor

# The largest magnitude of a group is taken to these integers, before they are clipped to -8 … 7.
_INT4_TARGETS = tuple(7.0 + 0.15 * step for step in range(20))
_INT4_GROUP_SIZES = (128, 64, 32)

# Weights in work at a time: temporary tensors of this size stay in a core's cache.
_BLOCK = 1 << 17


class RoundedRows(Protocol):
    """A weight that is rounded as its rows come in."""

    def put(self, start: int, weight: Tensor) -> None:
        """Round float rows [n, columns] into the rows from `start` on. Raises ValueError when one holds infinity or NaN."""
        ...

    def tensor(self) -> CompactWeight:
        """The weight, once all rows are in."""
        ...


class WeightRounding(Protocol):
    """A way to round weights."""

    def begin(self, rows: int, columns: int) -> RoundedRows:
        """Memory for one weight."""
        ...

    def of_part(self, columns: int, part: tuple[int, int]) -> WeightRounding | None:
        """What rounds the input features [start, stop) of a weight of `columns` as they are rounded in the whole; None when that needs
        whole rows."""
        ...


@dataclass(frozen=True)
class RoundingScheme:
    """bits: 8 (per output feature) or 4. group_size: input features that share a scale at 4 bits; not used at 8."""

    bits: int
    group_size: int = 32

    def begin(self, rows: int, columns: int) -> RoundedWeight:
        """See WeightRounding."""
        return RoundedWeight(rows, columns, self)

    def of_part(self, columns: int, part: tuple[int, int]) -> RoundingScheme | None:
        """See WeightRounding. Groups of 4 bits have scales of their own; the scale at 8 bits is that of the whole row."""
        scheme = self.for_columns(columns)
        aligned = scheme.bits == 4 and all(border % scheme.group_size == 0 for border in part)
        return scheme if aligned or part == (0, columns) else None

    def for_columns(self, columns: int) -> RoundingScheme:
        """The scheme for a weight with this many input features: the largest group that is not above ours and divides them, or, where not
        even 32 does, 8 bits."""
        if self.bits == 8:
            return self
        for size in _INT4_GROUP_SIZES:
            if size <= self.group_size and columns % size == 0:
                return RoundingScheme(4, size)
        return RoundingScheme(8)


class RoundedWeight:
    """A weight [rows, columns] that is rounded as its rows come in."""

    def __init__(self, rows: int, columns: int, scheme: RoundingScheme) -> None:
        self.scheme = scheme.for_columns(columns)
        self._group_size = columns if self.scheme.bits == 8 else self.scheme.group_size
        self._codes = torch.empty(rows, columns, dtype=torch.uint8)
        self._scales = torch.empty(rows, columns // self._group_size)

    def put(self, start: int, weight: Tensor) -> None:
        """Round float rows [n, columns] into the rows from `start` on. Raises ValueError when one holds infinity or NaN."""
        step = max(1, _BLOCK // max(1, weight.shape[1]))
        round_rows = _round_int8 if self.scheme.bits == 8 else _round_int4
        for first in range(0, len(weight), step):
            rows = weight[first : first + step].to(torch.float32)
            target = slice(start + first, start + first + len(rows))
            round_rows(rows, self._codes[target], self._scales[target])
        scales = self._scales[start : start + len(weight)]
        if not bool(torch.isfinite(scales).all()):
            raise ValueError("it holds infinity or NaN, which cannot be rounded")

    def tensor(self) -> QuantizedTensor:
        """The weight, once all rows are in."""
        return QuantizedTensor(self._codes, self.scheme.bits, self._group_size, self._scales)


def round_weight(weight: Tensor, scheme: RoundingScheme) -> QuantizedTensor:
    """Round a float weight [N, K]. Raises ValueError when it holds infinity or NaN."""
    rounded = RoundedWeight(weight.shape[0], weight.shape[1], scheme)
    rounded.put(0, weight)
    return rounded.tensor()


def _round_int8(weight: Tensor, codes: Tensor, scales: Tensor) -> None:
    """weight float32 [n, K] → codes uint8 [n, K], scales float32 [n, 1]."""
    largest = weight.abs().amax(dim=1, keepdim=True)
    torch.div(largest, 127, out=scales)
    inverse = torch.where(scales > torch.finfo(torch.float32).tiny, 1 / scales, 0)
    codes.copy_((weight * inverse).round_().add_(128))


def _round_int4(weight: Tensor, codes: Tensor, scales: Tensor) -> None:
    """weight float32 [n, K] → codes uint8 [n, K], scales float32 [n, K / group], rounded to what float16 holds."""
    group_size = weight.shape[1] // scales.shape[1]
    # One group a column: what is done for all members of a group then runs along contiguous memory.
    groups = weight.reshape(-1, group_size).t().contiguous()
    low, high = groups.aminmax(dim=0)
    extreme = torch.where(high > -low, high, low)
    inverse = torch.where(extreme.abs() > torch.finfo(torch.float32).tiny, -1 / extreme, 0)
    integers, products = torch.empty_like(groups), torch.empty_like(groups)
    best = torch.full_like(extreme, -1)
    best_scale, best_target = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for target in _INT4_TARGETS:
        torch.mul(groups, inverse * target, out=integers)
        integers.round_().clamp_(-8, 7)
        dot = torch.mul(groups, integers, out=products).sum(dim=0)
        square = torch.mul(integers, integers, out=products).sum(dim=0).clamp_(min=1)
        score = dot * dot / square
        better = score > best
        best = torch.where(better, score, best)
        best_scale = torch.where(better, dot / square, best_scale)
        best_target = torch.where(better, target, best_target)
    torch.mul(groups, inverse * best_target, out=integers)
    integers.round_().clamp_(-8, 7).add_(8)
    codes.copy_(integers.t().reshape(codes.shape))
    finite = torch.isfinite(low) & torch.isfinite(high)
    scales.copy_(torch.where(finite, best_scale, torch.nan).to(torch.float16).view_as(scales))
