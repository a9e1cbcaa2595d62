"""Rows of packed weights as floats: the lookups of an embedding, and slices of a weight on their way to cuBLAS.

A program has 128 threads on 512 consecutive words of one row and writes each plane of them as it is decoded, four features (8 bytes of
16-bit floats) per thread. Read: the codes and scales of the rows asked for, once. Written: their numbers, once.

Twin: `GPUWeight.dequantize()[rows]`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.execution.kernels.triton import support
from penstock.execution.kernels.triton.linear_decode import (
    ONE_BITS,
    decode_plane,
    is_integer,
    middle,
    num_planes,
    unit,
)
from penstock.execution.kernels.triton.linear_pack import GPUWeight

_WORDS = 512


def dequantize_rows(weight: GPUWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ids, int64 [T] → [T, K] in `dtype`, input features in their own order. An id that is out of range gives the nearest row."""
    rows = _decoded(weight, ids.contiguous(), 0, len(ids), dtype)
    if weight.input_order is None:
        return rows
    return torch.empty_like(rows).index_copy_(1, weight.input_order, rows)


def dequantize_slice(weight: GPUWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start … stop - 1 in `dtype` [stop - start, K], columns in the order of the weight's `input_order`."""
    return _decoded(weight, None, start, stop - start, dtype)


def _decoded(weight: GPUWeight, ids: Tensor | None, start: int, count: int, dtype: torch.dtype) -> Tensor:
    output = torch.empty(count, weight.in_features, dtype=dtype, device=weight.words.device)
    if count == 0:
        return output
    words = min(_WORDS, triton.next_power_of_2(weight.words.shape[1]))
    _rows_kernel[(count, triton.cdiv(weight.words.shape[1], words))](
        ids,
        start,
        weight.words,
        weight.scales,
        weight.offsets,
        weight.codebook,
        output,
        weight.out_features,
        weight.in_features,
        weight.words.shape[1],
        weight.spans,
        weight.factor,
        ONE_BITS,
        FORM=weight.form,
        GROUPED=weight.grouped,
        SCALE_ROWS=weight.scale_rows,
        SPANS=words // weight.run,
        RUN=weight.run,
        NATIVE_FLOAT8=support.gpu(output.device).has_fp8,
        num_warps=4,
    )
    return output


@triton.jit(do_not_specialize=["start"])
def _rows_kernel(
    ids,
    start,
    codes,
    scales,
    offsets,
    codebook,
    output,
    out_features,
    in_features,
    row_words,
    num_spans,
    factor,
    one_bits,
    FORM: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    RUN: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = start + place if ids is None else tl.load(ids + place)
    row = tl.maximum(tl.minimum(row, out_features - 1), 0)
    span = tl.program_id(1) * SPANS + tl.arange(0, SPANS)
    inside = span < num_spans
    word = span[:, None] * RUN + tl.arange(0, RUN)[None, :]
    words = tl.load(codes + row * row_words + word, mask=inside[:, None], other=0)
    if GROUPED:
        parameter = (row // SCALE_ROWS) * num_spans + span
        scale = tl.load(scales + parameter, mask=inside, other=0.0).to(tl.float32)[:, None] * factor
    else:
        scale = tl.load(scales + row) * factor
    if offsets is not None:
        offset = tl.load(offsets + parameter, mask=inside, other=0.0).to(tl.float32)[:, None] * factor
    for plane in tl.static_range(num_planes(FORM)):
        values = decode_plane(words, one_bits, codebook, plane, FORM, NATIVE_FLOAT8)
        if is_integer(FORM):
            values = (values - middle(FORM, plane)) * unit(FORM, plane)
        values *= scale
        if offsets is not None:
            values -= offset
        k = span[:, None] * (RUN * num_planes(FORM)) + plane * RUN + tl.arange(0, RUN)[None, :]
        tl.store(output + place * in_features + k, values, mask=k < in_features)
