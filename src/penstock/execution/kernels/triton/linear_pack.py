"""Quantised weights in the layout that the Triton kernels read (linear_decode.py, linear_gemv.py, linear_gemm.py).

Codes lie in 32-bit words: eight of 4 bits, or four of 8. Input features come in spans of 128, or of one group of scales where groups are
smaller; a span is cut into as many runs as a word has codes, and word j of a span holds feature j of every run, the first run in the
lowest bits:

    span of 128, 4 bits:  word j (0 … 15) = features j, j + 16, j + 32, … j + 112
    span of 128, 8 bits:  word j (0 … 31) = features j, j + 32, j + 64, j + 96

So a tile of consecutive words, shifted by the same number of bits, is a tile of consecutive features (a plane), which is what tl.dot
wants: nothing is ever permuted on the device. All codes of a word share one scale. A thread's 16-byte load is four words of one row, and a
row starts at a multiple of 64 bytes, because K is padded to a multiple of 128; activations of the padding count as zero.

Twin: `GPUWeight.dequantize`, the numbers that the kernels compute with.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.quantized import CodebookTensor, Float8Tensor, QuantizedTensor

# int4, int8: integers. codebook: 4-bit indices into 16 floats. float8: e4m3.
WeightForm = Literal["int4", "int8", "codebook", "float8"]

_BITS: dict[WeightForm, int] = {"int4": 4, "int8": 8, "codebook": 4, "float8": 8}

# K is padded to a multiple of this, the longest span.
ALIGNMENT = 128
# Groups of four-bit codes are at least this long, so that every plane of a span is read with loads of eight bytes.
_SMALLEST_FOUR_BIT_GROUP = 32
_SMALLEST_GROUP = 16


@dataclass(frozen=True)
class GPUWeight:
    """One weight [out_features, in_features] in the kernels' layout, on the device.

        weight[n, k] = factor * (scales[n // scale_rows, g] * (code - middle) - offsets[n, g])      g = k // span, or 0 without groups

    code - middle: the integer minus 8 or 128, the number in the table, or the 8-bit float itself.

    words: int32 [N, padded K / codes per word]. span: input features that lie together, 16 … 128. grouped: each span has scales of its
    own. scales: [ceil(N / scale_rows), spans] or, not grouped, float32 [N]. Grouped scales are float16 after division by `factor`, a power
    of two, which loses nothing of scales stored in 16 bits unless they are 2 ** 14 times smaller than the largest; block scales of 8-bit
    floats stay float32. offsets: like scales, or None. codebook: float32 [16]. input_order: int64 [K] or None; column k
    belongs to input feature input_order[k].
    """

    form: WeightForm
    out_features: int
    in_features: int
    words: Tensor
    span: int
    grouped: bool
    scales: Tensor
    offsets: Tensor | None = None
    codebook: Tensor | None = None
    input_order: Tensor | None = None
    scale_rows: int = 1
    factor: float = 1.0

    @property
    def bits(self) -> int:
        return _BITS[self.form]

    @property
    def run(self) -> int:
        """Words of one span."""
        return self.span * self.bits // 32

    @property
    def spans(self) -> int:
        """Spans of a row, padding included."""
        return self.words.shape[1] // self.run

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.words, self.scales, self.offsets, self.codebook, self.input_order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def codes(self) -> Tensor:
        """uint8 [N, padded K], columns in their order in the weight."""
        planes = [(self.words >> shift) & ((1 << self.bits) - 1) for shift in range(0, 32, self.bits)]
        rows = self.out_features
        by_span = torch.stack([plane.view(rows, -1, self.run) for plane in planes], dim=2)
        return by_span.view(rows, -1).to(torch.uint8)

    def dequantize(self) -> Tensor:
        """The weight, float32 [N, K], columns in the order of `input_order`."""
        codes = self.codes()
        if self.codebook is not None:
            values = self.codebook[codes.to(torch.int64)]
        elif self.form == "float8":
            values = codes.view(torch.float8_e4m3fn).to(torch.float32)
        else:
            values = codes.to(torch.float32) - (1 << (self.bits - 1))
        weight = values * self._spread(self.scales)
        if self.offsets is not None:
            weight -= self._spread(self.offsets)
        return (weight * self.factor)[:, : self.in_features]

    def _spread(self, parameters: Tensor) -> Tensor:
        """One number per weight, or one per row [N, 1]."""
        if not self.grouped:
            return parameters.float().unsqueeze(1)
        rows = parameters.float().repeat_interleave(self.scale_rows, 0)[: self.out_features]
        return rows.repeat_interleave(self.span, 1)


def pack(weight: QuantizedTensor | CodebookTensor | Float8Tensor, device: torch.device) -> GPUWeight:
    """The weight on `device`. Raises IntegrityError for a group size that `can_pack` refuses."""
    if not can_pack(weight):
        raise IntegrityError(
            f"a weight with groups of {group_of(weight)} input features was handed to the GPU's kernels"
        )
    if isinstance(weight, Float8Tensor):
        return _pack_float8(weight, device)
    if isinstance(weight, CodebookTensor):
        packed = _pack_grouped("codebook", weight.codes, weight.group_size, weight.scales, None, device)
        return dataclasses.replace(packed, codebook=weight.codebook.to(device, torch.float32))
    return _pack_integers(weight, device)


def can_pack(weight: QuantizedTensor | CodebookTensor | Float8Tensor) -> bool:
    """Whether the kernels' layout can hold the weight."""
    group = group_of(weight)
    if isinstance(weight, Float8Tensor):
        return group == weight.shape[1] or group % ALIGNMENT == 0
    return group == weight.shape[1] or group % _SMALLEST_GROUP == 0


def group_of(weight: QuantizedTensor | CodebookTensor | Float8Tensor) -> int:
    """Input features that share a scale."""
    return min(weight.block[1], weight.shape[1]) if isinstance(weight, Float8Tensor) else weight.group_size


def _pack_integers(weight: QuantizedTensor, device: torch.device) -> GPUWeight:
    codes, scales, offsets = weight.codes.to(device), weight.scales.to(device), weight.offsets
    order = None if weight.input_order is None else weight.input_order.to(device)
    bits, group = weight.bits, weight.group_size
    if offsets is not None:
        # From code 0 to the middle code: the numbers are smaller then, and lose less in 16 bits.
        offsets = offsets.to(device) - weight.zero_code * scales
    if bits == 4 and group < weight.shape[1] and _span(group) < _SMALLEST_FOUR_BIT_GROUP:
        bits, codes = 8, codes + (128 - 8)
    form: WeightForm = "int4" if bits == 4 else "int8"
    if group < weight.shape[1] or offsets is not None:
        packed = _pack_grouped(form, codes, group, scales, offsets, device)
    else:
        packed = _pack_rowwise(form, codes, scales.flatten())
    return dataclasses.replace(packed, input_order=order)


def _pack_grouped(
    form: WeightForm, codes: Tensor, group: int, scales: Tensor, offsets: Tensor | None, device: torch.device
) -> GPUWeight:
    rows, columns = codes.shape
    # One offset per output feature is spread over spans, which the kernels know how to subtract.
    span = _span(group) if group < columns else ALIGNMENT
    words = _words(codes.to(device), _BITS[form], span)
    spans = words.shape[1] * 32 // _BITS[form] // span
    parameters = [scales.to(device)] if offsets is None else [scales.to(device), offsets.to(device)]
    spread = [_spread_groups(parameter, group, span, spans) for parameter in parameters]
    factor = _power_of_two(max(float(parameter.abs().max()) for parameter in spread))
    halves = [(parameter / factor).to(torch.float16) for parameter in spread]
    return GPUWeight(
        form, rows, columns, words, span, True, halves[0], halves[1] if offsets is not None else None, factor=factor
    )


def _pack_rowwise(form: WeightForm, codes: Tensor, scales: Tensor) -> GPUWeight:
    rows, columns = codes.shape
    words = _words(codes, _BITS[form], ALIGNMENT)
    return GPUWeight(form, rows, columns, words, ALIGNMENT, False, scales.to(torch.float32).contiguous())


def _pack_float8(weight: Float8Tensor, device: torch.device) -> GPUWeight:
    rows, columns = weight.shape
    codes, scales = weight.codes.view(torch.uint8).to(device), weight.scales.to(device, torch.float32)
    if group_of(weight) == columns:
        by_row = scales.flatten().repeat_interleave(weight.block[0])[:rows]
        return _pack_rowwise("float8", codes, by_row)
    words = _words(codes, 8, ALIGNMENT)
    spans = words.shape[1] // (ALIGNMENT // 4)
    spread = _spread_groups(scales, weight.block[1], ALIGNMENT, spans).contiguous()
    return GPUWeight("float8", rows, columns, words, ALIGNMENT, True, spread, scale_rows=min(weight.block[0], rows))


def _words(codes: Tensor, bits: int, span: int) -> Tensor:
    """uint8 [N, K] → int32 [N, padded K * bits / 32]."""
    rows, columns = codes.shape
    planes = 32 // bits
    codes = F.pad(codes, (0, -columns % ALIGNMENT))
    by_plane = codes.view(rows, -1, planes, span // planes)
    words = torch.zeros(rows, by_plane.shape[1], span // planes, dtype=torch.int32, device=codes.device)
    for plane in range(planes):
        words |= by_plane[:, :, plane].to(torch.int32) << (plane * bits)
    return words.view(rows, -1)


def _spread_groups(parameters: Tensor, group: int, span: int, spans: int) -> Tensor:
    """[rows, groups] → [rows, spans], with zeros for spans of padding."""
    spread = parameters.repeat_interleave(max(1, group // span), 1)[:, :spans] if group > span else parameters
    return F.pad(spread.to(torch.float32), (0, spans - spread.shape[1]))


def _span(group: int) -> int:
    """The longest span, a power of two, that groups of this size are made of."""
    return math.gcd(group, ALIGNMENT)


def _power_of_two(largest: float) -> float:
    """A power of two p with largest / p between 0.5 and 1."""
    return 1.0 if largest == 0 or not math.isfinite(largest) else 2.0 ** math.frexp(largest)[1]
