"""y = x @ weight.T + bias for one token: a GEMV that reads the packed weight once, at the rate of memory.

A program has a few rows of the weight and walks along K, 256 words (1 KiB) of each row at a time. Each of its 64 threads has four words
of every row (16 bytes, coalesced), and the activations that belong to them once for all rows, so that their cost is shared. Copies are
asynchronous and two steps ahead: with eight rows 16 KiB are in flight for each program, and registers (170 a thread, of 4 bits) leave room
for six programs on a multiprocessor: 96 KiB on their way, where some 26 KiB cover the latency of memory. Sums stay in the thread until the
end of the row; there is one reduction over threads per program. K is never split: rows alone make enough programs, with fewer rows in
each when there are few. Every row is summed in a fixed order.

Read per call: N * K * bits / 8 bytes of codes, 2 bytes per group of scales (4 with offsets), K activations per program from the caches.
Arithmetic at 4 bits: 3.8 instructions per weight as compiled for sm_90 (LOP3, FMA, half a shift, and the scales' and activations' share),
which an H200 can issue for 3.9 TB/s of codes; at 8 bits it is far from a limit. That is why nothing is rounded, converted or scaled inside.

Twin: x @ weight.dequantize().T.
"""

from __future__ import annotations

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

_WARPS = 2
# Words of one row that a program reads in one step: four for each thread.
_STEP_WORDS = _WARPS * 32 * 4
# Words of all its rows; eight loads of 16 bytes for each thread.
_TILE_WORDS = 8 * _STEP_WORDS
# Steps whose copies are on their way, the one that is computed included.
_STAGES = 3


def gemv(x: Tensor, weight: GPUWeight, bias: Tensor | None, output: Tensor) -> None:
    """x [1, K] with neighbouring columns → output [1, N], written in its type; sums in float32."""
    gpu = support.gpu(x.device)
    step = min(_STEP_WORDS, triton.next_power_of_2(weight.words.shape[1]))
    rows = _TILE_WORDS // step
    # Two even for a single step: Triton 3.6 makes twice the code of a loop without copies ahead.
    stages = _STAGES if weight.words.shape[1] > 2 * step else 2
    if weight.form == "codebook":
        # Lookups in flight need registers of their own, and would be copied ahead like words.
        rows, stages = rows // 2, 1
    while rows > 2 and 2 * triton.cdiv(weight.out_features, rows) < 3 * gpu.num_multiprocessors:
        rows //= 2
    _gemv_kernel[(triton.cdiv(weight.out_features, rows),)](
        x,
        weight.words,
        weight.scales,
        weight.offsets,
        weight.codebook,
        bias,
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
        ROWS=rows,
        SPANS=step // weight.run,
        RUN=weight.run,
        STAGES=stages,
        NATIVE_FLOAT8=gpu.has_fp8,
        num_warps=_WARPS,
    )


@triton.jit
def _gemv_kernel(
    x,
    codes,
    scales,
    offsets,
    codebook,
    bias,
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
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    PLANES: tl.constexpr = num_planes(FORM)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows beyond the last are computed like the last and not stored.
    known = tl.minimum(row, out_features - 1).to(tl.int64)
    row_start = codes + known[:, None, None] * row_words
    # Sums of unit * x * v, unit * x * middle and x, each scaled where groups have scales.
    total = tl.zeros((ROWS, SPANS, RUN), dtype=tl.float32)
    total_middle = tl.zeros((1, SPANS, RUN), dtype=tl.float32)
    for first in tl.range(0, num_spans, SPANS, num_stages=STAGES):
        span = first + tl.arange(0, SPANS)
        inside = span < num_spans
        word = span[None, :, None] * RUN + tl.arange(0, RUN)[None, None, :]
        words = tl.load(row_start + word, mask=inside[None, :, None], other=0)
        # Activations have a dimension for rows from the start; given one later, they would be held once for each row (Triton 3.6).
        feature = span[None, :, None] * (RUN * PLANES) + tl.arange(0, RUN)[None, None, :]
        if GROUPED:
            products = tl.zeros((ROWS, SPANS, RUN), dtype=tl.float32)
            middles = tl.zeros((1, SPANS, RUN), dtype=tl.float32)
        else:
            products = total
            middles = total_middle
        plain = tl.zeros((1, SPANS, RUN), dtype=tl.float32)
        for plane in tl.static_range(PLANES):
            k = feature + plane * RUN
            activations = tl.load(x + k, mask=k < in_features, other=0.0).to(tl.float32)
            if offsets is not None:
                plain += activations
            activations *= unit(FORM, plane)
            values = decode_plane(words, one_bits, codebook, plane, FORM, NATIVE_FLOAT8)
            products += values * activations
            if is_integer(FORM):
                middles += activations * middle(FORM, plane)
        if GROUPED:
            place = (known // SCALE_ROWS)[:, None] * num_spans + span[None, :]
            scale = tl.load(scales + place, mask=inside[None, :], other=0.0).to(tl.float32)
            total += scale[:, :, None] * (products - middles)
            if offsets is not None:
                offset = tl.load(offsets + place, mask=inside[None, :], other=0.0).to(tl.float32)
                total -= offset[:, :, None] * plain
        else:
            total = products
            total_middle = middles
    if not GROUPED:
        total -= total_middle
    result = tl.sum(tl.sum(total, axis=2), axis=1) * factor
    if not GROUPED:
        result *= tl.load(scales + known)
    if bias is not None:
        result += tl.load(bias + known).to(tl.float32)
    tl.store(output + row, result, mask=row < out_features)
