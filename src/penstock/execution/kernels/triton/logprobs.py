"""Log-probabilities of chosen tokens and of the most likely ones, without a sort. The twin is sampling/logprobs.torch_token_logprobs.

    _partial_kernel   rows x blocks   reads V * b bytes once (b: bytes per logit): per block its maximum, the sum of exponentials, the
                                      number of logits above the chosen one, and its K largest, taken one by one from registers
    _merge_kernel     rows            the same of the blocks' results: 8 K bytes for each of V / BLOCK blocks

K is at most 20, so that taking the largest K times costs less than sorting a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.types import MAX_TOP_LOGPROBS
from penstock.execution.kernels.triton.sampling import BLOCK, has_nan, without_nan


def find_top_logprobs(
    logits: Tensor, logit_rows: Tensor, token_rows: Tensor, token_ids: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs float32 [L], ranks int32 [L] (1 + number of strictly more likely tokens), top_ids int32 [L, K] and top_logprobs float32
    [L, K], lower ids first among equals; K = num_top, at most V and MAX_TOP_LOGPROBS. Rows without a distribution: NaN, rank 1, ids from 0.

    logits: [R, V], any float type; logit_rows: int64 [L], rows of logits; token_rows: int64 [L], places of their tokens in token_ids,
    int64 [M].
    """
    rows, vocab_size = len(logit_rows), logits.shape[1]
    blocks = triton.cdiv(vocab_size, BLOCK)
    device = logits.device
    numbers = torch.empty(rows, blocks, 2, device=device)
    block_ranks = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    values = torch.empty(rows, blocks, num_top, device=device)
    ids = torch.empty(rows, blocks, num_top, dtype=torch.int32, device=device)
    logprobs = torch.empty(rows, device=device)
    ranks = torch.empty(rows, dtype=torch.int32, device=device)
    top_ids = torch.empty(rows, num_top, dtype=torch.int32, device=device)
    top_logprobs = torch.empty(rows, num_top, device=device)
    _partial_kernel[(blocks, rows)](
        logits,
        logit_rows,
        token_rows,
        token_ids,
        numbers,
        block_ranks,
        values,
        ids,
        vocab_size,
        logits.stride(0),
        num_top,
        BLOCK=BLOCK,
        num_warps=4,
    )
    _merge_kernel[(rows,)](
        logits,
        logit_rows,
        token_rows,
        token_ids,
        numbers,
        block_ranks,
        values,
        ids,
        logprobs,
        ranks,
        top_ids,
        top_logprobs,
        vocab_size,
        logits.stride(0),
        blocks,
        num_top,
        PADDED_BLOCKS=triton.next_power_of_2(blocks),
        PADDED_TOP=triton.next_power_of_2(MAX_TOP_LOGPROBS),
        num_warps=4,
    )
    return logprobs, ranks, top_ids, top_logprobs


@triton.jit
def _chosen_logit(logits, logit_rows, token_rows, token_ids, row, stride):
    token = tl.load(token_ids + tl.load(token_rows + row))
    return tl.load(logits + tl.load(logit_rows + row) * stride + token).to(tl.float32)


@triton.jit(do_not_specialize=["num_top"])
def _partial_kernel(
    logits, logit_rows, token_rows, token_ids, numbers, block_ranks, values, ids, vocab_size, stride, num_top,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    place = row * tl.num_programs(0) + block
    chosen = _chosen_logit(logits, logit_rows, token_rows, token_ids, row, stride)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    x = tl.load(logits + tl.load(logit_rows + row) * stride + tokens, mask=inside, other=-float("inf")).to(tl.float32)
    is_nan = has_nan(x)
    x = without_nan(x)
    largest = tl.max(x, axis=0)
    # A block of nothing but minus infinity has a sum of 0; one with infinity fails with its row.
    shift = tl.where((largest == -float("inf")) | (largest == float("inf")), 0.0, largest)
    total = tl.sum(tl.exp(tl.minimum(x - shift, 0.0)), axis=0)
    tl.store(numbers + 2 * place, tl.where(is_nan, float("nan"), largest))
    tl.store(numbers + 2 * place + 1, total)
    tl.store(block_ranks + place, tl.sum((x > chosen).to(tl.int32), axis=0))
    # Those that were taken, or never were there, have a number below all tokens' ids.
    left = tl.where(inside, tokens, -1)
    for index in range(num_top):
        largest = tl.max(tl.where(left >= 0, x, -float("inf")), axis=0)
        first = tl.min(tl.where((left >= 0) & (x == largest), tokens, vocab_size), axis=0)
        tl.store(values + place * num_top + index, largest)
        tl.store(ids + place * num_top + index, first)
        left = tl.where(tokens == first, -1, left)


@triton.jit(do_not_specialize=["num_top"])
def _merge_kernel(
    logits, logit_rows, token_rows, token_ids, numbers, block_ranks, values, ids, logprobs, ranks, top_ids,
    top_logprobs, vocab_size, stride, num_blocks, num_top,
    PADDED_BLOCKS: tl.constexpr, PADDED_TOP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chosen = _chosen_logit(logits, logit_rows, token_rows, token_ids, row, stride)
    blocks = tl.arange(0, PADDED_BLOCKS)
    inside = blocks < num_blocks
    place = row * num_blocks + blocks
    block_maxima = tl.load(numbers + 2 * place, mask=inside, other=-float("inf"))
    totals = tl.load(numbers + 2 * place + 1, mask=inside, other=0.0)
    is_nan = has_nan(block_maxima)
    block_maxima = without_nan(block_maxima)
    maximum = tl.max(block_maxima, axis=0)
    has_failed = is_nan | (maximum == float("inf")) | (maximum == -float("inf"))
    shift = tl.where(has_failed, 0.0, maximum)
    total = tl.sum(tl.where(inside & (totals > 0), totals * tl.exp(tl.minimum(block_maxima - shift, 0.0)), 0.0), axis=0)
    logarithm = tl.log(tl.where(has_failed, 1.0, total))
    rank = 1 + tl.sum(tl.load(block_ranks + place, mask=inside, other=0), axis=0)
    tl.store(logprobs + row, tl.where(has_failed, float("nan"), chosen - shift - logarithm))
    tl.store(ranks + row, tl.where(has_failed, 1, rank))
    columns = tl.arange(0, PADDED_TOP)
    # An id of V marks a block that had fewer tokens.
    entries = place[:, None] * num_top + columns[None, :]
    here = inside[:, None] & (columns[None, :] < num_top)
    x = tl.load(values + entries, mask=here, other=-float("inf"))
    tokens = tl.load(ids + entries, mask=here, other=vocab_size)
    for index in range(num_top):
        largest = tl.max(tl.max(tl.where(tokens < vocab_size, x, -float("inf")), axis=1), axis=0)
        first = tl.min(tl.min(tl.where(x == largest, tokens, vocab_size), axis=1), axis=0)
        tl.store(top_ids + row * num_top + index, tl.where(has_failed, index, first))
        tl.store(
            top_logprobs + row * num_top + index, tl.where(has_failed, float("nan"), largest - shift - logarithm)
        )  # fmt: skip
        tokens = tl.where(tokens == first, vocab_size, tokens)
