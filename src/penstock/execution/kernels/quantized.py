"""A quantised weight in the one form that every checkpoint format is turned into and every kernel is packed from.

    weight[n, k] = scales[n, g] * codes[n, k] - offsets[n, g]        with g = k // group_size

Codes are unsigned. A symmetric weight has no offsets; its zero is the middle code, 2 ** (bits - 1):

    4 bits   codes 0 … 15,  zero at 8          8 bits   codes 0 … 255, zero at 128
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
