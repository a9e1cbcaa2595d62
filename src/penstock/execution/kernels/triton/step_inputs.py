"""Kernels that turn the few numbers which the host sends for a step into the inputs of the model, and that keep what was sampled.

Token ids and block tables of every request lie on the device, one row per slot. The host sends only what it alone knows: which slots
run, from where and how far, new blocks, and the tokens of new requests. What a step starts from may have been sampled a moment
ago and never left the device.

    host      runs [ row | column | where its data is | how much ]       ─▶ `write_runs`     rows of token_ids and block_table
              slots, starts, query_start, first_sample, num_drafts       ─▶ `prepare_inputs` positions, token ids, slots of the cache …
    sampler   tokens, failed                                             ─▶ `append_tokens`  rows of token_ids, and one tensor to fetch

Drafts are token ids like others, behind the known ones of their request; what is sampled instead of them overwrites them.

A step lies in the buffers request after request, without gaps, or, for a recorded step in which every request has `query_len` rows, at
equal distances, with padding in front of requests that have fewer tokens:

    query_len 0   [ a a a b c c ]        query_len 3   [ a a a | - - b | - c c | - - - ]      -: token 0 at position 0, not written

A token of such padding takes the place of one further back in its request's context, which it neither changes nor is asked about.

All three move a few bytes per token (a decode step of 256 requests with contexts of 1,024: 130 KB, nearly all of it block tables), so
what they cost is their launch. A program has up to 256 numbers of one request: with one request in the batch a long context is
spread over many programs, and 256 decodes are 256 programs. Sizes that differ between steps are not compiled in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@dataclass(frozen=True)
class StepTensors:
    """Tensors that keep their place. S slots, up to R requests, T tokens and B blocks of `block_size` tokens for each request.

    token_ids: int32 [S, L], prompt and output of each slot; block_table: int32 [S, B].
    input_ids, positions, slot_mapping: int64 [T]; query_start: int32 [R + 1]; seq_lens: int32 [R]; block_tables: int32 [R, B];
    request_slots: int64 [R], the slot of each request: the step's inputs, in the order of its requests (see AttentionMetadata).
    logit_rows, sample_slots, sample_positions: int64 [M], for each token that is sampled, one behind what is known and one behind each
    draft, request after request: the row of the token it follows, its slot, and its position. sampled: int64 [M], the tokens, -1 where
    there is none.
    """

    block_size: int
    token_ids: Tensor
    block_table: Tensor
    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    request_slots: Tensor
    logit_rows: Tensor
    sample_slots: Tensor
    sample_positions: Tensor
    sampled: Tensor


def write_runs(target: Tensor, runs: Tensor, data: Tensor, longest: int) -> None:
    """target[row, column : column + count] = data[offset : offset + count] for each (row, column, offset, count) of runs, int32 [N, 4].

    target: int32 [rows, columns]; data: int32; longest: the largest count.
    """
    grid = (len(runs), triton.cdiv(longest, _BLOCK))
    _runs_kernel[grid](target, runs, data, target.stride(0), BLOCK=_BLOCK, num_warps=2)


def prepare_inputs(
    rows: Tensor,
    tensors: StepTensors,
    *,
    num_requests: int,
    num_tokens: int,
    max_count: int,
    max_seq_len: int,
    filled_requests: int = 0,
    filled_tokens: int = 0,
    query_len: int = 0,
) -> None:
    """Fill the inputs of a step in `tensors`.

    rows: int32 [5, at least num_requests + 1]: slot of each request, position of its first token in the step, query_start, the first of the
    tokens that it samples (-1: it does not sample), and how many of its tokens are drafts, fewer than 256. max_count: the most tokens of a
    request; max_seq_len: the longest context; num_tokens: rows that the step takes, num_requests * query_len with a query_len.
    Rows of requests and of tokens behind the step become padding up to filled_requests and filled_tokens: no context, token 0, position 0,
    a slot that is not written.
    """
    width = max(max_count, query_len, triton.cdiv(max_seq_len, tensors.block_size))
    num_padded = max(0, filled_requests - num_requests, filled_tokens - num_tokens)
    _prepare_kernel[num_requests + triton.cdiv(num_padded, _BLOCK), triton.cdiv(width, _BLOCK)](
        rows,
        tensors.token_ids,
        tensors.block_table,
        tensors.input_ids,
        tensors.positions,
        tensors.slot_mapping,
        tensors.query_start,
        tensors.seq_lens,
        tensors.block_tables,
        tensors.request_slots,
        tensors.logit_rows,
        tensors.sample_slots,
        tensors.sample_positions,
        rows.stride(0),
        tensors.token_ids.stride(0),
        tensors.block_table.stride(0),
        num_requests,
        num_tokens,
        filled_requests,
        filled_tokens,
        query_len,
        BLOCK_SIZE=tensors.block_size,
        BLOCK=_BLOCK,
        num_warps=2,
    )


def append_tokens(tensors: StepTensors, token_ids: Tensor, failed: Tensor) -> None:
    """Append the sampled tokens, int64 [M], to those of their slots, and keep them in `sampled`, with -1 where `failed`, bool [M]."""
    count = len(token_ids)
    _append_kernel[(triton.cdiv(count, _BLOCK),)](
        tensors.token_ids,
        tensors.sampled,
        tensors.sample_slots,
        tensors.sample_positions,
        token_ids,
        failed.view(torch.uint8),
        tensors.token_ids.stride(0),
        count,
        BLOCK=_BLOCK,
        num_warps=2,
    )


def write_runs_twin(target: Tensor, runs: Tensor, data: Tensor, longest: int) -> None:
    """`write_runs` in torch's operators."""
    for row, column, offset, count in runs.tolist():
        target[row, column : column + count] = data[offset : offset + count]


def prepare_inputs_twin(
    rows: Tensor,
    tensors: StepTensors,
    *,
    num_requests: int,
    num_tokens: int,
    max_count: int,
    max_seq_len: int,
    filled_requests: int = 0,
    filled_tokens: int = 0,
    query_len: int = 0,
) -> None:
    """`prepare_inputs` in torch's operators."""
    slots, starts, query_start, first_sample, num_drafts = rows.tolist()
    padding = [slice(num_tokens, filled_tokens)]
    tensors.query_start[0] = 0
    for request in range(num_requests):
        slot, start, count = slots[request], starts[request], query_start[request + 1] - query_start[request]
        first = query_start[request] if not query_len else request * query_len + query_len - count
        padding.append(slice(request * query_len, first if query_len else 0))
        end, last = start + count, first + count
        positions = torch.arange(start, end, device=rows.device)
        tensors.positions[first:last] = positions
        tensors.input_ids[first:last] = tensors.token_ids[slot, start:end].to(torch.int64)
        blocks = tensors.block_table[slot, positions // tensors.block_size].to(torch.int64)
        tensors.slot_mapping[first:last] = blocks * tensors.block_size + positions % tensors.block_size
        num_blocks = triton.cdiv(end, tensors.block_size)
        tensors.block_tables[request, :num_blocks] = tensors.block_table[slot, :num_blocks]
        tensors.query_start[request + 1] = last
        tensors.seq_lens[request] = end
        tensors.request_slots[request] = slot
        if first_sample[request] >= 0:
            for back in range(num_drafts[request] + 1):
                index = first_sample[request] + num_drafts[request] - back
                tensors.logit_rows[index] = last - 1 - back
                tensors.sample_slots[index] = slot
                tensors.sample_positions[index] = end - back
    for tensor in (tensors.seq_lens, tensors.request_slots):
        tensor[num_requests:filled_requests] = 0
    for part in padding:
        tensors.input_ids[part] = tensors.positions[part] = 0
        tensors.slot_mapping[part] = -1


def append_tokens_twin(tensors: StepTensors, token_ids: Tensor, failed: Tensor) -> None:
    """`append_tokens` in torch's operators."""
    count = len(token_ids)
    slots, positions = tensors.sample_slots[:count], tensors.sample_positions[:count]
    tensors.token_ids[slots, positions] = token_ids.to(torch.int32)
    tensors.sampled[:count] = token_ids.masked_fill(failed, -1)


@triton.jit
def _runs_kernel(target, runs, data, stride, BLOCK: tl.constexpr):
    run = runs + tl.program_id(0) * 4
    row, column, offset, count = tl.load(run), tl.load(run + 1), tl.load(run + 2), tl.load(run + 3)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    values = tl.load(data + offset + index, mask=inside)
    tl.store(target + row.to(tl.int64) * stride + column + index, values, mask=inside)


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "filled_requests", "filled_tokens", "query_len"])
def _prepare_kernel(
    rows,
    token_ids,
    block_table,
    input_ids,
    positions,
    slot_mapping,
    query_start,
    seq_lens,
    block_tables,
    request_slots,
    logit_rows,
    sample_slots,
    sample_positions,
    rows_stride,
    token_stride,
    table_stride,
    num_requests,
    num_tokens,
    filled_requests,
    filled_tokens,
    query_len,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    part = tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    if request < num_requests:
        slot = tl.load(rows + request).to(tl.int64)
        start = tl.load(rows + rows_stride + request)
        first = tl.load(rows + 2 * rows_stride + request)
        count = tl.load(rows + 2 * rows_stride + request + 1) - first
        end = start + count
        if query_len > 0:
            front = query_len - count
            first = request * query_len + front
            _pad_tokens(input_ids, positions, slot_mapping, request * query_len + index, index < front)
        last = first + count

        inside = index < count
        position = start + index
        token = tl.load(token_ids + slot * token_stride + position, mask=inside, other=0)
        block = tl.load(block_table + slot * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
        tl.store(input_ids + first + index, token.to(tl.int64), mask=inside)
        tl.store(positions + first + index, position.to(tl.int64), mask=inside)
        tl.store(slot_mapping + first + index, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)

        known = index < tl.cdiv(end, BLOCK_SIZE)
        blocks = tl.load(block_table + slot * table_stride + index, mask=known, other=0)
        tl.store(block_tables + request.to(tl.int64) * table_stride + index, blocks, mask=known)

        if part == 0:
            tl.store(query_start + request + 1, last)
            tl.store(seq_lens + request, end)
            tl.store(request_slots + request, slot)
            if request == 0:
                tl.store(query_start, 0)
            first_sample = tl.load(rows + 3 * rows_stride + request)
            if first_sample >= 0:
                drafts = tl.load(rows + 4 * rows_stride + request)
                sampled = index <= drafts
                tl.store(logit_rows + first_sample + index, (last - 1 - drafts + index).to(tl.int64), mask=sampled)
                tl.store(sample_slots + first_sample + index, slot + tl.zeros_like(index), mask=sampled)
                tl.store(sample_positions + first_sample + index, (end - drafts + index).to(tl.int64), mask=sampled)
    elif part == 0:
        behind = (request - num_requests) * BLOCK + index
        nothing = tl.zeros_like(behind)
        padded = num_requests + behind < filled_requests
        tl.store(seq_lens + num_requests + behind, nothing, mask=padded)
        tl.store(request_slots + num_requests + behind, nothing.to(tl.int64), mask=padded)
        behind += num_tokens
        _pad_tokens(input_ids, positions, slot_mapping, behind, behind < filled_tokens)


@triton.jit
def _pad_tokens(input_ids, positions, slot_mapping, index, padded):
    nothing = tl.zeros_like(index).to(tl.int64)
    tl.store(input_ids + index, nothing, mask=padded)
    tl.store(positions + index, nothing, mask=padded)
    tl.store(slot_mapping + index, nothing - 1, mask=padded)


@triton.jit(do_not_specialize=["count"])
def _append_kernel(
    token_ids, sampled, sample_slots, sample_positions, chosen, failed, token_stride, count, BLOCK: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    slot = tl.load(sample_slots + index, mask=inside, other=0)
    position = tl.load(sample_positions + index, mask=inside, other=0)
    token = tl.load(chosen + index, mask=inside, other=0)
    has_failed = tl.load(failed + index, mask=inside, other=0) != 0
    tl.store(token_ids + slot * token_stride + position, token.to(tl.int32), mask=inside)
    tl.store(sampled + index, tl.where(has_failed, -1, token), mask=inside)
