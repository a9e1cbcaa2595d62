"""Which experts tokens go to, and in which order their rows are multiplied: what surrounds the grouped product of moe_gemm.py.

A pair is a token and one of its experts, number token * k + i. A grouped product works on blocks of rows that all belong to one expert, so
pairs are put in order by expert and every expert's are padded to whole blocks (as in MegaBlocks: Gale et al., 2022, arXiv:2211.15841):

    expert        0           2                 5            -1
    slots      [ 3 7 · · | 0 1 4 9 | 12 · · · | 2 · · · | …         ]        ·: no pair
    blocks        0           1        2          3

How many blocks there are is known on the device only, so launches have as many as there could be, and those that are too many have
expert -1. Nothing here waits for the device; everything can be recorded. Experts of other processes have no blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.execution.kernels.moe import Routing

_CHUNK = 1024


@dataclass(frozen=True)
class Arrangement:
    """Pairs in order. slots: int32 [blocks * rows], pairs, or their number where there is none. experts: int32 [blocks], counted from the
    first one that is here; -1: an unused block. rows: of a block."""

    slots: Tensor
    experts: Tensor
    rows: int


def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """logits [T, E] → weights float32 [T, k], the largest first, and their experts, int32 [T, k]. Of equal shares the expert with the
    lower number comes first. Twin: kernels.moe.route."""
    tokens = len(logits)
    weights = torch.empty(tokens, routing.per_token, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, routing.per_token, dtype=torch.int32, device=logits.device)
    _route_kernel[(tokens,)](
        logits,
        weights,
        chosen,
        routing.num_experts,
        logits.stride(0),
        PER_TOKEN=routing.per_token,
        WIDTH=triton.next_power_of_2(routing.per_token),
        RENORMALIZE=routing.renormalize,
        EXPERTS=triton.next_power_of_2(routing.num_experts),
        num_warps=1,
    )
    return weights, chosen


def most_blocks(pairs: int, experts: int, rows: int) -> int:
    """How many blocks `pairs` pairs may fill: every expert that is used may have one block that is not full."""
    return (pairs + min(pairs, experts) * (rows - 1)) // rows


def arrange(chosen: Tensor, first: int, present: int, rows: int) -> Arrangement:
    """The pairs of experts first … first + present - 1, in blocks of `rows`. chosen: int32 [T, k]. Twin: `arrange_twin`."""
    pairs = chosen.numel()
    blocks = most_blocks(pairs, present, rows)
    slots = torch.empty(blocks * rows, dtype=torch.int32, device=chosen.device)
    experts = torch.empty(blocks, dtype=torch.int32, device=chosen.device)
    counts = torch.empty(present, dtype=torch.int32, device=chosen.device)
    chunk = min(_CHUNK, triton.next_power_of_2(pairs))
    _count_kernel[(present,)](chosen, counts, pairs, first, CHUNK=chunk, num_warps=4)
    _place_kernel[(present,)](
        chosen,
        counts,
        slots,
        experts,
        pairs,
        first,
        present,
        blocks,
        PRESENT=triton.next_power_of_2(present),
        ROWS=rows,
        CHUNK=chunk,
        num_warps=4,
    )
    return Arrangement(slots, experts, rows)


def arrange_twin(chosen: Tensor, first: int, present: int, rows: int) -> Arrangement:
    """`arrange` in torch's operators."""
    flat = chosen.flatten()
    slots = torch.full((most_blocks(len(flat), present, rows), rows), len(flat), dtype=torch.int32)
    experts = torch.full((len(slots),), -1, dtype=torch.int32)
    block = 0
    for expert in range(present):
        for piece in torch.where(flat == first + expert)[0].split(rows):
            if len(piece):
                slots[block, : len(piece)] = piece
                experts[block] = expert
                block += 1
    return Arrangement(slots.flatten(), experts, rows)


def mix(results: Tensor, weights: Tensor, chosen: Tensor, first: int, present: int) -> Tensor:
    """results [T * k, H], one row for each pair, weights and chosen [T, k] → the weighted sum of each token's rows, [T, H], added up in
    float32 in the order of its experts. Rows of experts that are not here are not read."""
    tokens, per_token = chosen.shape
    size = results.shape[1]
    output = results.new_empty(tokens, size)
    block = min(1024, triton.next_power_of_2(size))
    _mix_kernel[(tokens, triton.cdiv(size, block))](
        results, weights, chosen, output, size, first, present, PER_TOKEN=per_token, BLOCK=block, num_warps=4
    )
    return output


@triton.jit
def _route_kernel(
    logits,
    weights,
    chosen,
    num_experts,
    stride,
    PER_TOKEN: tl.constexpr,
    WIDTH: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    known = expert < num_experts
    row = tl.load(logits + token * stride + expert, mask=known, other=0.0).to(tl.float32)
    # A token whose numbers are none goes anywhere; what experts give for it is no number either.
    row = tl.where(row == row, tl.minimum(tl.maximum(row, -1e38), 1e38), 0.0)  # noqa: PLR0124
    row = tl.where(known, row, float("-inf"))
    shares = tl.exp(row - tl.max(row, axis=0))
    shares = tl.where(known, shares / tl.sum(shares, axis=0), -1.0)
    place = tl.arange(0, WIDTH)
    best_shares = tl.zeros((WIDTH,), dtype=tl.float32)
    best_experts = tl.zeros((WIDTH,), dtype=tl.int32)
    for k in tl.static_range(PER_TOKEN):
        largest = tl.max(shares, axis=0)
        best = tl.min(tl.where(shares == largest, expert, EXPERTS), axis=0)
        best_shares = tl.where(place == k, largest, best_shares)
        best_experts = tl.where(place == k, best, best_experts)
        shares = tl.where(expert == best, -1.0, shares)
    if RENORMALIZE:
        best_shares /= tl.sum(best_shares, axis=0)
    tl.store(weights + token * PER_TOKEN + place, best_shares, mask=place < PER_TOKEN)
    tl.store(chosen + token * PER_TOKEN + place, best_experts, mask=place < PER_TOKEN)


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(chosen, counts, pairs, first, CHUNK: tl.constexpr):
    expert = tl.program_id(0)
    total = tl.zeros((CHUNK,), dtype=tl.int32)
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        total += (tl.load(chosen + pair, mask=pair < pairs, other=-1) == first + expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["pairs", "num_blocks"])
def _place_kernel(
    chosen,
    counts,
    slots,
    experts,
    pairs,
    first,
    present,
    num_blocks,
    PRESENT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert = tl.program_id(0)
    other = tl.arange(0, PRESENT)
    blocks = (tl.load(counts + other, mask=other < present, other=0) + ROWS - 1) // ROWS
    start = tl.sum(tl.where(other < expert, blocks, 0), axis=0)
    end = start + tl.sum(tl.where(other == expert, blocks, 0), axis=0)
    line = tl.arange(0, ROWS)
    for block in range(start, end, ROWS):
        tl.store(experts + block + line, expert, mask=block + line < end)
    if expert == present - 1:
        for block in range(end, num_blocks, ROWS):
            tl.store(experts + block + line, -1, mask=block + line < num_blocks)
    placed = start * ROWS
    for begin in range(0, pairs, CHUNK):
        pair = begin + tl.arange(0, CHUNK)
        own = (tl.load(chosen + pair, mask=pair < pairs, other=-1) == first + expert).to(tl.int32)
        tl.store(slots + placed + tl.cumsum(own, axis=0) - 1, pair, mask=own > 0)
        placed += tl.sum(own, axis=0)
    tl.store(slots + placed + line, pairs, mask=placed + line < end * ROWS)


@triton.jit
def _mix_kernel(results, weights, chosen, output, size, first, present, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(PER_TOKEN):
        pair = token * PER_TOKEN + k
        expert = tl.load(chosen + pair) - first
        here = inside & (expert >= 0) & (expert < present)
        row = tl.load(results + pair * size + column, mask=here, other=0.0).to(tl.float32)
        total += row * tl.load(weights + pair)
    tl.store(output + token * size + column, total, mask=inside)
