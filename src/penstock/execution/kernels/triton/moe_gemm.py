"""The grouped product of a mixture of experts: every block of rows of moe_routing.py times the weight of its expert, in one launch.

A program has a tile of output features and one block of rows, and walks along K as linear_gemm.py does: weights are the left operand,
floats as they are, codes decoded in registers. Programs of unused blocks end at once. K is not split: with few tokens there are as many
blocks as experts in use, each of which has tiles for several multiprocessors.

Read per call: the weights of experts in use, once for each of their blocks, and activations once for each tile of output features.

Twin: for each pair, x @ weight[expert].dequantize().T.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.execution.kernels.triton import support
from penstock.execution.kernels.triton.linear_decode import ONE_BITS, decode_tile, num_planes
from penstock.execution.kernels.triton.linear_pack import GPUWeight
from penstock.execution.kernels.triton.moe_routing import Arrangement

# Words of a row that a step takes, the span of 128 features; of float weights, features.
_STEP_WORDS = {4: 16, 8: 32}
_FLOAT_STEP = 64


@dataclass(frozen=True)
class GroupedFloats:
    """Weights [E, N, K], contiguous, of one float type."""

    weights: Tensor

    @property
    def out_features(self) -> int:
        return self.weights.shape[1]

    @property
    def in_features(self) -> int:
        return self.weights.shape[2]


@dataclass(frozen=True)
class GroupedCodes:
    """Packed weights of one form, whose tensors lie one after the other, [E, ...]. first: the form, its tensors those of expert 0.

    factors: float32 [E]. Built by `group_codes`.
    """

    first: GPUWeight
    words: Tensor
    scales: Tensor
    offsets: Tensor | None
    input_order: Tensor | None
    factors: Tensor

    @property
    def out_features(self) -> int:
        return self.first.out_features

    @property
    def in_features(self) -> int:
        return self.first.in_features

    def weight(self, expert: int) -> GPUWeight:
        """The weight of one expert, a view."""
        return dataclasses.replace(
            self.first,
            words=self.words[expert],
            scales=self.scales[expert],
            offsets=None if self.offsets is None else self.offsets[expert],
            input_order=None if self.input_order is None else self.input_order[expert],
            factor=float(self.factors[expert]),
        )


GroupedWeight = GroupedFloats | GroupedCodes


def group_codes(weights: Sequence[GPUWeight]) -> GroupedCodes | None:
    """The weights beside each other in new memory; None when they are not of one form."""
    first = weights[0]
    if any(_form(weight) != _form(first) for weight in weights):
        return None
    if first.codebook is not None:
        books = [weight.codebook for weight in weights if weight.codebook is not None]
        if not all(torch.equal(book, first.codebook) for book in books):
            return None
    offsets = [weight.offsets for weight in weights if weight.offsets is not None]
    orders = [weight.input_order for weight in weights if weight.input_order is not None]
    return GroupedCodes(
        first,
        torch.stack([weight.words for weight in weights]),
        torch.stack([weight.scales for weight in weights]),
        torch.stack(offsets) if offsets else None,
        torch.stack(orders) if orders else None,
        torch.tensor([weight.factor for weight in weights], dtype=torch.float32, device=first.words.device),
    )


def block_rows(pairs: int, experts: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a block for so many pairs: about as many as an expert gets, at least what tensor cores want."""
    largest = 128 if support.gpu(device).capability >= 90 else 64
    if dtype == torch.float32:
        # Without tensor cores, and with twice the bytes.
        largest = 32
    rows: int = triton.next_power_of_2(triton.cdiv(pairs, experts))
    return min(largest, max(16, rows))


def grouped_product(
    x: Tensor, weight: GroupedWeight, arrangement: Arrangement, output: Tensor, pairs_per_row: int
) -> None:
    """Row p of `output` [P, N] becomes row p // pairs_per_row of x [M, K] times the weight of pair p's expert. x and output are contiguous;
    rows of pairs that are not in the arrangement stay as they are. Sums in float32."""
    rows = arrangement.rows
    tile_n = 64 if rows == 16 or x.dtype == torch.float32 else 128
    num_warps = 4 if tile_n == 64 and x.dtype != torch.float32 else 8
    gpu = support.gpu(x.device)
    grid = (triton.cdiv(weight.out_features, tile_n), len(arrangement.experts))
    floats = isinstance(weight, GroupedFloats)
    codes = None if isinstance(weight, GroupedFloats) else weight
    form = None if codes is None else codes.first
    row_words = weight.in_features if form is None else form.words.shape[1]
    step = _FLOAT_STEP if form is None else _STEP_WORDS[form.bits]
    _grouped_kernel[grid](
        x,
        weight.weights if isinstance(weight, GroupedFloats) else weight.words,
        None if codes is None else codes.scales,
        None if codes is None else codes.offsets,
        None if form is None else form.codebook,
        None if codes is None else codes.input_order,
        None if codes is None else codes.factors,
        output,
        arrangement.slots,
        arrangement.experts,
        len(output),
        pairs_per_row,
        weight.out_features,
        weight.in_features,
        row_words,
        1 if form is None else form.spans,
        1 if codes is None else codes.scales[0].numel(),
        triton.cdiv(row_words, step),
        ONE_BITS,
        FORM="floats" if form is None else form.form,
        GROUPED=form is not None and form.grouped,
        SCALE_ROWS=1 if form is None else form.scale_rows,
        TILE_N=tile_n,
        ROWS=rows,
        STEP=step,
        RUN=1 if form is None else form.run,
        EVEN_K=weight.in_features % (step if form is None else form.span) == 0
        and (floats or weight.in_features == row_words * 32 // (8 if form is None else form.bits)),
        NATIVE_FLOAT8=gpu.has_fp8,
        num_warps=num_warps,
        num_stages=4 if rows <= 32 else 3,
    )


def _form(weight: GPUWeight) -> tuple[object, ...]:
    """What weights share that one launch can compute with."""
    return (
        weight.form,
        weight.out_features,
        weight.in_features,
        weight.span,
        weight.grouped,
        weight.scale_rows,
        weight.scales.dtype,
        weight.offsets is None,
        weight.input_order is None,
    )


@triton.jit
def _decoded(
    words,
    scales,
    offsets,
    parameter,
    codebook,
    one_bits,
    FORM: tl.constexpr,
    GROUPED: tl.constexpr,
    RUN: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    """Words as weights. parameter: places of their scales and offsets, where groups have some."""
    scale = None
    offset = None
    if GROUPED:
        scale = tl.load(scales + parameter).to(tl.float32)
        if offsets is not None:
            offset = tl.load(offsets + parameter).to(tl.float32)
    return decode_tile(words, one_bits, codebook, scale, offset, RUN, FORM, DTYPE, NATIVE_FLOAT8)


@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_kernel(
    x,
    codes,
    scales,
    offsets,
    codebook,
    input_order,
    factors,
    output,
    slots,
    experts,
    num_pairs,
    pairs_per_row,
    out_features,
    in_features,
    row_words,
    num_spans,
    num_scales,
    num_steps,
    one_bits,
    FORM: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    EVEN_K: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    FLOATS: tl.constexpr = FORM == "floats"
    PLANES: tl.constexpr = 1 if FLOATS else num_planes(FORM)
    block = tl.program_id(1)
    expert = tl.load(experts + block).to(tl.int64)
    if expert >= 0:
        row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
        # Output features beyond the last are computed like the last and not stored; rows without a pair like the last pair.
        known = tl.minimum(row, out_features - 1).to(tl.int64)
        row_start = codes + (expert * out_features + known)[:, None] * row_words
        pair = tl.load(slots + block * ROWS + tl.arange(0, ROWS))
        source = tl.minimum(pair, num_pairs - 1) // pairs_per_row
        source_start = x + source.to(tl.int64)[None, :] * in_features
        parameter_start = expert * num_scales + (known // SCALE_ROWS)[:, None] * num_spans
        total = tl.zeros((TILE_N, ROWS), dtype=tl.float32)
        for step in range(num_steps):
            word = step * STEP + tl.arange(0, STEP)
            k = step * (STEP * PLANES) + tl.arange(0, STEP * PLANES)
            place = k
            if input_order is not None:
                place = tl.load(input_order + expert * in_features + tl.minimum(k, in_features - 1))
            if EVEN_K:
                activations = tl.load(source_start + place[:, None])
            else:
                activations = tl.load(source_start + place[:, None], mask=(k < in_features)[:, None], other=0.0)
            if FLOATS:
                inside = True if EVEN_K else (word < in_features)[None, :]
                decoded = tl.load(row_start + word[None, :], mask=inside, other=0.0)
            else:
                words = tl.load(row_start + word[None, :])
                decoded = _decoded(
                    words,
                    scales,
                    offsets,
                    parameter_start + ((word // RUN)[None, :] if RUN < STEP else step),
                    codebook,
                    one_bits,
                    FORM,
                    GROUPED,
                    RUN,
                    x.dtype.element_ty,
                    NATIVE_FLOAT8,
                )
            total = tl.dot(decoded, activations, total, input_precision="ieee")
        if not FLOATS:
            if not GROUPED:
                total *= tl.load(scales + expert * num_scales + known)[:, None]
            total *= tl.load(factors + expert)
        inside = (row < out_features)[:, None] & (pair < num_pairs)[None, :]
        tl.store(output + pair.to(tl.int64)[None, :] * out_features + row[:, None], total, mask=inside)
