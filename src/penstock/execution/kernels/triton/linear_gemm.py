"""y = x @ weight.T + bias for 2 to some hundred tokens: tensor cores over weights that are decoded in registers.

A program has a tile of output features and of tokens and walks along K, 128 features of every row at a time (one span of
linear_pack.py, or several): codes and activations come through asynchronous copies, several steps ahead; all planes of the codes are
decoded, scaled in float32, rounded once to the type of activations, and multiplied at once as the left operand, y.T = weight @ x.T,
because that operand may stay in registers. As compiled for sm_90 that is 5.6 instructions a weight, whatever the number of tokens: an
H200 can issue them for 2.6 TB/s of codes at 4 bits and 5 TB/s at 8, so that up to 16 tokens of an 8-bit weight cost what reading it costs.

Small matrices do not have tiles for every multiprocessor, so K is split among programs. They write partial sums (float32) and draw a
ticket; the one with the last ticket adds all parts in their order, so that results are the same every time, and puts the counter back to
zero. Counters belong to one weight, which must not be in use on two streams at once.

Read per call: N * K * bits / 8 bytes of codes and their scales for each tile of tokens, and activations once for each tile of output
features, from the second-level cache; split parts are written and read once, 8 bytes each, mostly in that cache.

Twin: x @ weight.dequantize().T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.execution.kernels.triton import support
from penstock.execution.kernels.triton.linear_decode import (
    ONE_BITS,
    decode_tile,
    num_planes,
)
from penstock.execution.kernels.triton.linear_pack import GPUWeight

# Words of a row that a step takes: the span of 128 features.
_STEP_WORDS = {4: 16, 8: 32}
_MAX_SPLITS = 16
# Steps that are worth a program of their own: enough to fill the pipeline.
_LEAST_STEPS = 4


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up. tile_n: output features, tile_m: tokens, splits: parts of K."""

    tile_n: int
    tile_m: int
    splits: int
    num_warps: int
    num_stages: int


def tiling(tokens: int, weight: GPUWeight, dtype: torch.dtype, gpu: support.GPU) -> Tiling:
    """The tiles for a number of tokens, the same whenever that number is.

    16 tokens need many programs with copies in flight, so tiles are small and there are four for each multiprocessor. With more, a tile's
    activations weigh as much as its codes, and tiles of 128 features use them twice as often; from 128 tokens on it is decoding that a
    larger tile shares, where registers suffice for it. Such tiles have a multiprocessor for themselves.
    """
    largest = 128 if gpu.capability >= 90 else 64
    tile_m = min(largest, max(16, triton.next_power_of_2(tokens)))
    tile_n = 64 if tile_m == 16 else 128
    if dtype == torch.float32:
        # Without tensor cores, and with twice the bytes.
        tile_m, tile_n = min(tile_m, 32), 64
    num_warps = 4 if tile_n == 64 and dtype != torch.float32 else 8
    tiles = triton.cdiv(weight.out_features, tile_n) * triton.cdiv(tokens, tile_m)
    steps = weight.words.shape[1] // _STEP_WORDS[weight.bits]
    wanted = {16: 4, 32: 2}.get(tile_m, 1) * gpu.num_multiprocessors
    splits = max(1, min(wanted // tiles, steps // _LEAST_STEPS, _MAX_SPLITS))
    return Tiling(tile_n, tile_m, splits, num_warps, 4 if tile_m <= 32 else 3)


def new_counters(out_features: int, max_tokens: int, device: torch.device) -> Tensor:
    """Tickets for every tile that `gemm` may have with up to `max_tokens` tokens; int32, zero between calls."""
    return torch.zeros(math.ceil(out_features / 64) * math.ceil(max_tokens / 16), dtype=torch.int32, device=device)


def gemm(x: Tensor, weight: GPUWeight, bias: Tensor | None, output: Tensor, counters: Tensor) -> None:
    """x [M, K] with neighbouring columns → output [M, N], contiguous, written in its type; sums in float32."""
    gpu = support.gpu(x.device)
    tokens = len(x)
    cut = tiling(tokens, weight, x.dtype, gpu)
    steps = weight.words.shape[1] // _STEP_WORDS[weight.bits]
    grid = (triton.cdiv(weight.out_features, cut.tile_n), triton.cdiv(tokens, cut.tile_m), cut.splits)
    partial = None
    if cut.splits > 1:
        partial = torch.empty(cut.splits, tokens, weight.out_features, dtype=torch.float32, device=x.device)
    _gemm_kernel[grid](
        x,
        weight.words,
        weight.scales,
        weight.offsets,
        weight.codebook,
        bias,
        output,
        partial,
        counters,
        tokens,
        weight.out_features,
        weight.in_features,
        x.stride(0),
        weight.words.shape[1],
        weight.spans,
        steps,
        triton.cdiv(steps, cut.splits),
        weight.factor,
        ONE_BITS,
        FORM=weight.form,
        GROUPED=weight.grouped,
        SCALE_ROWS=weight.scale_rows,
        TILE_N=cut.tile_n,
        TILE_M=cut.tile_m,
        STEP=_STEP_WORDS[weight.bits],
        RUN=weight.run,
        SPLIT=cut.splits > 1,
        # Parts on their way together when they are added, as far as registers go.
        PARTS_AT_ONCE=2 if cut.tile_m == 16 else 1,
        EVEN_K=weight.in_features % (weight.spans * weight.span) == 0,
        NATIVE_FLOAT8=gpu.has_fp8,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )


@triton.jit(do_not_specialize=["tokens"])
def _gemm_kernel(
    x,
    codes,
    scales,
    offsets,
    codebook,
    bias,
    output,
    partial,
    counters,
    tokens,
    out_features,
    in_features,
    x_stride,
    row_words,
    num_spans,
    num_steps,
    split_steps,
    factor,
    one_bits,
    FORM: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    EVEN_K: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    PLANES: tl.constexpr = num_planes(FORM)
    split = tl.program_id(2)
    row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    token = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    # Rows and tokens beyond the last are computed like the last and not stored.
    known = tl.minimum(row, out_features - 1).to(tl.int64)
    row_start = codes + known[:, None] * row_words
    parameter_start = (known // SCALE_ROWS)[:, None] * num_spans
    token_start = x + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_stride
    total = tl.zeros((TILE_N, TILE_M), dtype=tl.float32)
    for step in range(split * split_steps, tl.minimum((split + 1) * split_steps, num_steps)):
        word = step * STEP + tl.arange(0, STEP)
        words = tl.load(row_start + word[None, :])
        k = step * (STEP * PLANES) + tl.arange(0, STEP * PLANES)
        if EVEN_K:
            activations = tl.load(token_start + k[:, None])
        else:
            activations = tl.load(token_start + k[:, None], mask=(k < in_features)[:, None], other=0.0)
        if GROUPED:
            # A step is one span or several.
            place = parameter_start + ((word // RUN)[None, :] if RUN < STEP else step)
            scale = tl.load(scales + place).to(tl.float32)
            offset = tl.load(offsets + place).to(tl.float32) if offsets is not None else None
        else:
            scale = None
            offset = None
        decoded = decode_tile(words, one_bits, codebook, scale, offset, RUN, FORM, x.dtype.element_ty, NATIVE_FLOAT8)
        total = tl.dot(decoded, activations, total, input_precision="ieee")
    if not GROUPED:
        total *= tl.load(scales + known)[:, None]
    total *= factor
    inside = (row < out_features)[:, None] & (token < tokens)[None, :]
    place = token.to(tl.int64)[None, :] * out_features + row[:, None]
    if SPLIT:
        part = tokens.to(tl.int64) * out_features
        tl.store(partial + split * part + place, total, mask=inside)
        # All threads have written their numbers before one of them draws the ticket that vouches for them.
        tl.debug_barrier()
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        ticket = tl.atomic_add(counter, 1, sem="acq_rel")
        last = ticket == tl.num_programs(2) - 1
        if last:
            total = tl.zeros((TILE_N, TILE_M), dtype=tl.float32)
            for other in tl.range(0, tl.num_programs(2), loop_unroll_factor=PARTS_AT_ONCE):
                total += tl.load(partial + other * part + place, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    else:
        last = True
    if last:
        if bias is not None:
            total += tl.load(bias + known).to(tl.float32)[:, None]
        tl.store(output + place, total, mask=inside)
