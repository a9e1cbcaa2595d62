"""Quantised weights in the canonical forms that checkpoint formats are turned into and kernels are packed from.

QuantizedTensor: integers.

    weight[n, k] = scales[n, g] * codes[n, k] - offsets[n, g]        with g = k // group_size

Codes are unsigned. A symmetric weight has no offsets; its zero is the middle code, 2 ** (bits - 1):

    4 bits   codes 0 … 15,  zero at 8          8 bits   codes 0 … 255, zero at 128

Float8Tensor: 8-bit floats with a scale for each block.      weight[n, k] = codes[n, k] * scales[n // rows, k // columns]
CodebookTensor: 4-bit indices into a table of 16 numbers.    weight[n, k] = codebook[codes[n, k]] * scales[n, k // group_size]

Parts of a weight have the very numbers of the whole. Where a part begins or ends within a group or block, it gets smaller ones, each with
the scale of the one that it was cut from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Groups and blocks that are not a whole row or column are multiples of this.
SMALLEST_GROUP = 16

# Numbers of a quantised weight that are float32 for a moment, where a part of it is made.
_CONVERTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight of N output and K input features, transient between a file and a kernel's layout.

    codes: uint8 [N, K], one code a byte whatever `bits` (4 or 8) is. group_size: input features that share a scale, a multiple of 16 that
    divides K, or K itself: one scale per output feature. scales: float32 [N, K / group_size]. offsets: float32 like scales, or None when
    symmetric. input_order: int64 [K] or None; with it, column k of `codes` belongs to input feature input_order[k] (GPTQ's act-order).
    """

    codes: Tensor
    bits: int
    group_size: int
    scales: Tensor
    offsets: Tensor | None = None
    input_order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def zero_code(self) -> int:
        return 1 << (self.bits - 1)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Output features [start, stop) of the weight; a view."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], offsets=offsets)

    def columns(self, start: int, stop: int) -> QuantizedTensor | None:
        """Input features [start, stop) of the weight, in memory of their own. None when no groups of one size can hold them: where a border
        cuts a group too finely, or groups are scattered over the input features (input_order)."""
        cut = _cut_groups(self.group_size, start, stop)
        if self.input_order is not None or cut is None:
            return None
        offsets = None if self.offsets is None else cut.scales(self.offsets)
        codes = self.codes[:, start:stop].contiguous()
        return replace(self, codes=codes, group_size=cut.size, scales=cut.scales(self.scales), offsets=offsets)

    def dequantize(self) -> Tensor:
        """The weight, float32 [N, K], input features in their own order."""
        rows, columns = self.shape
        codes = self.codes.view(rows, -1, self.group_size).to(torch.float32)
        scales = self.scales.unsqueeze(-1)
        weight = (
            (codes - self.zero_code) * scales if self.offsets is None else codes * scales - self.offsets.unsqueeze(-1)
        )
        weight = weight.view(rows, columns)
        if self.input_order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.input_order, weight)
        return weight


@dataclass(frozen=True)
class Float8Tensor:
    """One weight of N output and K input features in 8-bit floats (e4m3, finite, largest magnitude 448).

    codes: float8_e4m3fn [N, K]. block: output and input features that share a scale: (N, K) one scale for all, (1, K) one per output
    feature, (128, 128) as DeepSeek has it; the last block of a row or column may be partly outside. scales: float32 [ceil(N / block[0]),
    ceil(K / block[1])]. activation_scale: a fixed scale for the layer's input, from calibration; None: found for each token.
    """

    codes: Tensor
    block: tuple[int, int]
    scales: Tensor
    activation_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, start: int, stop: int) -> Float8Tensor:
        """Output features [start, stop) of the weight; codes are a view."""
        height = self.block[0]
        # Blocks of one row hold any part.
        single = _CutGroups(1, start // height, height, start % height, stop - start)
        cut = _cut_groups(height, start, stop, last_may_be_partial=True) or single
        return replace(
            self, codes=self.codes[start:stop], scales=cut.scales(self.scales.t()).t(), block=(cut.size, self.block[1])
        )

    def columns(self, start: int, stop: int) -> Float8Tensor | None:
        """Input features [start, stop) of the weight, in memory of their own. None when a border cuts a block too finely."""
        cut = _cut_groups(self.block[1], start, stop, last_may_be_partial=True)
        if cut is None:
            return None
        codes = self.codes[:, start:stop].contiguous()
        return replace(self, codes=codes, scales=cut.scales(self.scales), block=(self.block[0], cut.size))

    def dequantize(self) -> Tensor:
        """The weight, float32 [N, K]."""
        rows, columns = self.shape
        scales = self.scales.repeat_interleave(self.block[0], 0)[:rows]
        return self.codes.to(torch.float32) * scales.repeat_interleave(self.block[1], 1)[:, :columns]


@dataclass(frozen=True)
class CodebookTensor:
    """One weight of N output and K input features whose 4-bit codes are looked up in a table, such as NF4.

    codes: uint8 [N, K], one code from 0 to 15 a byte. codebook: float32 [16]. group_size: input features that share a scale; divides K.
    scales: float32 [N, K / group_size]. name: what the table is called.
    """

    codes: Tensor
    codebook: Tensor
    group_size: int
    scales: Tensor
    name: str = "nf4"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, start: int, stop: int) -> CodebookTensor:
        """Output features [start, stop) of the weight; a view."""
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop])

    def columns(self, start: int, stop: int) -> CodebookTensor | None:
        """Input features [start, stop) of the weight, in memory of their own. None when a border cuts a group too finely."""
        cut = _cut_groups(self.group_size, start, stop)
        if cut is None:
            return None
        codes = self.codes[:, start:stop].contiguous()
        return replace(self, codes=codes, group_size=cut.size, scales=cut.scales(self.scales))

    def dequantize(self) -> Tensor:
        """The weight, float32 [N, K]."""
        rows, columns = self.shape
        values = self.codebook[self.codes.to(torch.int64)].view(rows, -1, self.group_size)
        return (values * self.scales.unsqueeze(-1)).view(rows, columns)


# A matrix in fewer bits than floats take: whatever is no plain Tensor.
CompactWeight = QuantizedTensor | Float8Tensor | CodebookTensor

# What a checkpoint may hold for a parameter.
StoredWeight = Tensor | CompactWeight


def part_of(value: CompactWeight, rows: tuple[int, int], columns: tuple[int, int]) -> StoredWeight:
    """Output features [start, stop) and input features [start, stop) of a weight: in fewer bits where groups allow it, else float32."""
    part = value.rows(*rows)
    if columns == (0, value.shape[1]):
        return part
    compact = part.columns(*columns)
    if compact is not None:
        return compact
    numbers = torch.empty(rows[1] - rows[0], columns[1] - columns[0], device=part.codes.device)
    step = max(1, _CONVERTED_AT_ONCE // value.shape[1])
    for start in range(0, len(numbers), step):
        stop = min(len(numbers), start + step)
        numbers[start:stop] = part.rows(start, stop).dequantize()[:, columns[0] : columns[1]]
    return numbers


@dataclass(frozen=True)
class _CutGroups:
    """Groups of a part. size: their input features. repeats: how many of them each old group from number `first` on is cut into, of which
    `count` from number `skipped` on are the part's."""

    size: int
    first: int
    repeats: int
    skipped: int
    count: int

    def scales(self, whole: Tensor) -> Tensor:
        """The part's columns of scales or offsets [N, groups], in memory of their own."""
        if self.repeats == 1:
            return whole[:, self.first : self.first + self.count].contiguous()
        old = -(-(self.skipped + self.count) // self.repeats)
        spread = whole[:, self.first : self.first + old].repeat_interleave(self.repeats, 1)
        return spread[:, self.skipped : self.skipped + self.count].contiguous()


def _cut_groups(size: int, start: int, stop: int, *, last_may_be_partial: bool = False) -> _CutGroups | None:
    """How groups of `size` input features become groups of the features [start, stop); None when those would be too small."""
    first = start // size
    if stop <= (first + 1) * size:
        return _CutGroups(stop - start, first, 1, 0, 1)
    if start % size == 0 and (last_may_be_partial or stop % size == 0):
        return _CutGroups(size, first, 1, 0, -(-stop // size) - first)
    finer = math.gcd(size, start) if last_may_be_partial else math.gcd(size, start, stop)
    if finer % SMALLEST_GROUP:
        return None
    skipped = (start - first * size) // finer
    return _CutGroups(finer, first, size // finer, skipped, -(-(stop - start) // finer))
