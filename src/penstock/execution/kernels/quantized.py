"""Quantised weights in the canonical forms that checkpoint formats are turned into and kernels are packed from.

QuantizedTensor: integers.

    weight[n, k] = scales[n, g] * codes[n, k] - offsets[n, g]        with g = k // group_size

Codes are unsigned. A symmetric weight has no offsets; its zero is the middle code, 2 ** (bits - 1):

    4 bits   codes 0 … 15,  zero at 8          8 bits   codes 0 … 255, zero at 128

Float8Tensor: 8-bit floats with a scale for each block.      weight[n, k] = codes[n, k] * scales[n // rows, k // columns]
CodebookTensor: 4-bit indices into a table of 16 numbers.    weight[n, k] = codebook[codes[n, k]] * scales[n, k // group_size]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Output features [start, stop) of the weight; a view."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], offsets=offsets)

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
        """Output features [start, stop) of the weight, a view. All of them are of one block, or `start` is the first of one."""
        height = self.block[0]
        scales = self.scales[start // height : -(-stop // height)]
        return replace(self, codes=self.codes[start:stop], scales=scales)

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

    def dequantize(self) -> Tensor:
        """The weight, float32 [N, K]."""
        rows, columns = self.shape
        values = self.codebook[self.codes.to(torch.int64)].view(rows, -1, self.group_size)
        return (values * self.scales.unsqueeze(-1)).view(rows, columns)


# A matrix in fewer bits than floats take: whatever is no plain Tensor.
CompactWeight = QuantizedTensor | Float8Tensor | CodebookTensor

# What a checkpoint may hold for a parameter.
StoredWeight = Tensor | CompactWeight
