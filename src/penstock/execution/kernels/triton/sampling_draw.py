"""Random tokens: the last steps of top_k and top_p, and a race of chunks of tokens, then of the winning chunk's tokens.

One program per row searches the few keys that sampling_filters.py left, four ways per round. What the race is says sampling/draw.py. Of a
filtered row only upper bounds of the chunks' weights are known, so a chunk's exact weight is added up when the time at which it could come
in at the earliest is before that of the best so far; mostly that is one chunk. Weights are integers, so a row's token does not depend on
the batch, nor on the order in which programs ran. Where a block has more than CAPACITY candidates (very many equal logits, or top_p after
a very large top_k) the search reads the row itself, in each round.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.execution.kernels.triton.sampling import (
    BLOCK,
    CAPACITY,
    END_KEY,
    INVERSE_TEMPERATURE,
    KEY,
    NUM_PIVOTS,
    NUM_ROUNDS,
    TOP_K,
    TOP_P,
    SampledTokens,
    SamplingTables,
    SamplingWorkspace,
    count_token,
    load_number,
    load_parameter,
)
from penstock.execution.kernels.triton.sampling_filters import narrow_thresholds
from penstock.execution.kernels.triton.sampling_keys import (
    CHUNK,
    FIRST_TOKEN,
    PAST_KEYS,
    arrival_times,
    block_keys,
    first_bracket,
    masses_before,
    position_start,
    second_bracket,
    token_keys,
    token_masses,
)

# Keys looked at together: eight per thread, with three counts and three sums for each in registers.
_TILE = 2048


def draw_tokens(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    pivots: Tensor,
    tables: SamplingTables,
    workspace: SamplingWorkspace,
    sampled: SampledTokens,
    *,
    filtered: bool,
    count: bool,
) -> None:
    """Replace the tokens of rows with a temperature, after sampling.choose_largest.

    logits: [M, V] as it left them; slots, positions: int64 [M]; pivots: sampling_keys.pivot_distances. filtered: some row has top_k or
    top_p. count: count the tokens as output.
    """
    rows, vocab_size = logits.shape
    narrow_thresholds(logits, slots, pivots, tables, workspace, sampled.failed, filtered=filtered)
    padded_blocks = triton.next_power_of_2(workspace.num_blocks)
    _draw_kernel[(rows,)](
        logits,
        slots,
        tables.parameters,
        workspace.maxima,
        sampled.failed,
        pivots,
        workspace.tallies,
        workspace.block_masses,
        workspace.chunk_masses,
        workspace.block_counts,
        workspace.candidate_counts,
        workspace.candidates,
        positions,
        tables.states,
        sampled.token_ids,
        vocab_size,
        logits.stride(0),
        workspace.num_blocks,
        FILTERED=filtered,
        COUNT=count,
        BLOCK=BLOCK,
        NUM_ROUNDS=NUM_ROUNDS,
        NUM_PIVOTS=NUM_PIVOTS,
        CAPACITY=CAPACITY,
        PADDED_BLOCKS=padded_blocks,
        COLUMNS=max(1, min(_TILE // padded_blocks, CAPACITY)),
        num_warps=8,
    )


@triton.jit
def _tile_keys(
    logits, candidates, counts, row, stride, offset, wide, floor, vocab_size, num_blocks, maximum, scale,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr, PADDED_BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some keys of each block, [PADDED_BLOCKS, COLUMNS]: its candidates from number `offset` on, or of a wide row its tokens."""
    blocks = tl.arange(0, PADDED_BLOCKS)[:, None]
    columns = offset + tl.arange(0, COLUMNS)[None, :]
    if wide:
        tokens = blocks * BLOCK + columns
        inside = tokens < vocab_size
        values = tl.load(logits + row * stride + tokens, mask=inside, other=-float("inf")).to(tl.float32)
        keys = token_keys(values, maximum, scale)
        keys = tl.where(inside & (keys >= floor), keys, PAST_KEYS)
    else:
        place = (row * num_blocks + blocks) * CAPACITY + columns
        keys = tl.load(candidates + place, mask=columns < counts[:, None], other=PAST_KEYS)
    return keys


@triton.jit
def _tally(
    logits, candidates, counts, row, stride, depth, wide, floor, vocab_size, num_blocks, maximum, scale,
    first, second, third,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Candidates below each of three keys: their numbers, and what is compared with the goal: their weights, or the numbers again."""
    counts_1 = tl.zeros([PADDED_BLOCKS, COLUMNS], tl.int32)
    counts_2 = tl.zeros([PADDED_BLOCKS, COLUMNS], tl.int32)
    counts_3 = tl.zeros([PADDED_BLOCKS, COLUMNS], tl.int32)
    masses_1 = tl.zeros([PADDED_BLOCKS, COLUMNS], tl.int64)
    masses_2 = tl.zeros([PADDED_BLOCKS, COLUMNS], tl.int64)
    masses_3 = tl.zeros([PADDED_BLOCKS, COLUMNS], tl.int64)
    for offset in range(0, depth, COLUMNS):
        keys = _tile_keys(
            logits, candidates, counts, row, stride, offset, wide, floor, vocab_size, num_blocks, maximum, scale,
            BLOCK, CAPACITY, PADDED_BLOCKS, COLUMNS,
        )  # fmt: skip
        counts_1 += (keys < first).to(tl.int32)
        counts_2 += (keys < second).to(tl.int32)
        counts_3 += (keys < third).to(tl.int32)
        if BY_MASS:
            masses = token_masses(keys)
            masses_1 += tl.where(keys < first, masses, 0)
            masses_2 += tl.where(keys < second, masses, 0)
            masses_3 += tl.where(keys < third, masses, 0)
    count_1, count_2, count_3 = tl.sum(counts_1), tl.sum(counts_2), tl.sum(counts_3)
    if BY_MASS:
        value_1, value_2, value_3 = tl.sum(masses_1), tl.sum(masses_2), tl.sum(masses_3)
    else:
        value_1, value_2, value_3 = count_1.to(tl.int64), count_2.to(tl.int64), count_3.to(tl.int64)
    return count_1, count_2, count_3, value_1, value_2, value_3


@triton.jit
def _search(
    logits, candidates, counts, row, stride, depth, wide, floor, vocab_size, num_blocks, maximum, scale,
    low, high, goal,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The key at which what a filter keeps ends: above `low`, where the number or weight of the candidates below is less than the goal,
    and up to `high`, where it is not, or beyond which nobody looks. It is found when one token lies between them (it is kept), or
    one key (equals stay or go together)."""
    below_low, _, below_high, _, _, _ = _tally(
        logits, candidates, counts, row, stride, depth, wide, floor, vocab_size, num_blocks, maximum, scale,
        low, low, high, False, BLOCK, CAPACITY, PADDED_BLOCKS, COLUMNS,
    )  # fmt: skip
    while (high - low > 1) & (below_high - below_low > 1):
        step = tl.maximum((high - low) // 4, 1)
        first = low + step
        second = tl.minimum(first + step, high - 1)
        third = tl.minimum(second + step, high - 1)
        count_1, count_2, count_3, value_1, value_2, value_3 = _tally(
            logits, candidates, counts, row, stride, depth, wide, floor, vocab_size, num_blocks, maximum, scale,
            first, second, third, BY_MASS, BLOCK, CAPACITY, PADDED_BLOCKS, COLUMNS,
        )  # fmt: skip
        passed_1 = value_1.to(tl.float64) < goal
        passed_2 = value_2.to(tl.float64) < goal
        passed_3 = value_3.to(tl.float64) < goal
        high = tl.where(passed_1, tl.where(passed_2, tl.where(passed_3, high, third), second), first)
        below_high = tl.where(passed_1, tl.where(passed_2, tl.where(passed_3, below_high, count_3), count_2), count_1)
        low = tl.where(passed_3, third, tl.where(passed_2, second, tl.where(passed_1, first, low)))
        below_low = tl.where(passed_3, count_3, tl.where(passed_2, count_2, tl.where(passed_1, count_1, below_low)))
    return high


@triton.jit
def _candidate_mass(
    logits, candidates, counts, row, stride, depth, wide, floor, vocab_size, num_blocks, maximum, scale, end,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr, PADDED_BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weight of the candidates below `end`."""
    masses = tl.zeros([PADDED_BLOCKS, COLUMNS], tl.int64)
    for offset in range(0, depth, COLUMNS):
        keys = _tile_keys(
            logits, candidates, counts, row, stride, offset, wide, floor, vocab_size, num_blocks, maximum, scale,
            BLOCK, CAPACITY, PADDED_BLOCKS, COLUMNS,
        )  # fmt: skip
        masses += masses_before(keys, end)
    return tl.sum(masses)


@triton.jit
def _race(
    logits, chunk_masses, row, stride, vocab_size, num_chunks, maximum, scale, end, start, PADDED_CHUNKS: tl.constexpr
):  # fmt: skip
    """The token that wins the row's race. chunk_masses: the weights of chunks, or what they are at most."""
    chunks = tl.arange(0, PADDED_CHUNKS)
    masses = tl.load(chunk_masses + row * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    earliest = arrival_times(start, chunks, masses)
    best, winner = float("inf") + tl.zeros([], tl.float64), 0
    time = tl.min(earliest, axis=0)
    while time < best:
        chunk = tl.min(tl.where(earliest == time, chunks, PADDED_CHUNKS), axis=0)
        keys = block_keys(logits, row, stride, chunk, vocab_size, maximum, scale, CHUNK)
        time = arrival_times(start, chunk, tl.sum(masses_before(keys, end), axis=0))
        winner = tl.where(time < best, chunk, winner)
        best = tl.minimum(time, best)
        earliest = tl.where(chunks == chunk, float("inf"), earliest)
        time = tl.min(earliest, axis=0)
    tokens = winner * CHUNK + tl.arange(0, CHUNK)
    keys = block_keys(logits, row, stride, winner, vocab_size, maximum, scale, CHUNK)
    times = arrival_times(start, tokens.to(tl.int64) + FIRST_TOKEN, masses_before(keys, end))
    return tl.min(tl.where(times == tl.min(times, axis=0), tokens, vocab_size), axis=0).to(tl.int64)


@triton.jit
def _draw_kernel(
    logits, slots, parameters, maxima, failed, pivots, tallies, block_masses, chunk_masses, block_counts,
    candidate_counts, candidates, positions, states, token_ids, vocab_size, stride, num_blocks,
    FILTERED: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, NUM_ROUNDS: tl.constexpr,
    NUM_PIVOTS: tl.constexpr, CAPACITY: tl.constexpr, PADDED_BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    scale = load_number(parameters, slot, INVERSE_TEMPERATURE).to(tl.float32)
    if (scale == 0.0) | (tl.load(failed + row) != 0):
        return
    maximum = tl.load(maxima + row)
    end = load_parameter(parameters, slot, END_KEY).to(tl.int32)
    top_k = load_parameter(parameters, slot, TOP_K)
    top_p = load_number(parameters, slot, TOP_P)
    by_count, by_mass = top_k < vocab_size, top_p < 1.0
    blocks = tl.arange(0, PADDED_BLOCKS)
    places = row * num_blocks + blocks
    if FILTERED:  # noqa: SIM102, at compile time
        if by_count | by_mass:
            low, high, goal = first_bracket(
                pivots, tallies, row, top_k, top_p, end, vocab_size, scale,
                NUM_ROUNDS, NUM_PIVOTS,
            )  # fmt: skip
            low, high = second_bracket(
                low, high, goal, tallies, row, NUM_ROUNDS, NUM_PIVOTS
            )  # fmt: skip
            floor = tl.where(by_count & by_mass, 0, low)
            counts = tl.load(candidate_counts + places, mask=blocks < num_blocks, other=0)
            depth = tl.max(counts, axis=0)
            wide = depth > CAPACITY
            depth = tl.where(wide, BLOCK, depth)
            # What is kept for certain counts towards the goals.
            masses = tl.load(block_masses + places, mask=blocks < num_blocks, other=0)
            goal -= tl.sum(masses, axis=0).to(tl.float64)
            if by_count:
                counts_below = tl.load(block_counts + places, mask=blocks < num_blocks, other=0)
                high = _search(
                    logits, candidates, counts, row, stride, depth, wide, floor, vocab_size, num_blocks, maximum,
                    scale, low, high, (top_k - tl.sum(counts_below, axis=0)).to(tl.float64),
                    False, BLOCK, CAPACITY, PADDED_BLOCKS, COLUMNS,
                )  # fmt: skip
                if by_mass:
                    low = 0
                    left = _candidate_mass(
                        logits, candidates, counts, row, stride, depth, wide, floor, vocab_size, num_blocks, maximum,
                        scale, high, BLOCK, CAPACITY, PADDED_BLOCKS, COLUMNS,
                    )  # fmt: skip
                    goal = top_p * left.to(tl.float64)
            if by_mass:
                high = _search(
                    logits, candidates, counts, row, stride, depth, wide, floor, vocab_size, num_blocks, maximum,
                    scale, low, high, goal, True, BLOCK, CAPACITY, PADDED_BLOCKS, COLUMNS,
                )  # fmt: skip
            end = tl.minimum(end, high)
    start = position_start(load_parameter(parameters, slot, KEY), tl.load(positions + row))
    token = _race(
        logits, chunk_masses, row, stride, vocab_size, num_blocks * (BLOCK // CHUNK), maximum, scale, end, start,
        PADDED_BLOCKS * (BLOCK // CHUNK),
    )  # fmt: skip
    tl.store(token_ids + row, token)
    if COUNT:
        count_token(states, parameters, slot, token, vocab_size, BLOCK)
