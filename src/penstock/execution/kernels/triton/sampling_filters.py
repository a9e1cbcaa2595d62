"""Where top_k and top_p end, without a sort: the threshold of each row is narrowed down until few tokens are left around it.

What the filters are is in sampling/filters.py. In terms of keys (sampling_keys.py) every filter keeps the keys below some end. With C(key)
and W(key), the number and the weight of the tokens below a key, a token is kept by top_k if C(its key) < k and by top_p if
W(its key) < p * W of what top_k left; where min_p ends is known beforehand. C or W is added up for NUM_PIVOTS keys in
one pass, so two passes leave a bracket of a fraction of a nat, and the last kernel sees only what lies in it.

    _first_tally_kernel    rows x blocks   reads V * b bytes (b: bytes per logit); C or W at fixed distances from the maximum; for rows
                                           without top_k and top_p the weight of each chunk of 128 tokens
    _second_tally_kernel   rows x blocks   reads the blocks that have a token below the bracket's upper end; C or W inside the bracket
    _collect_kernel        rows x blocks   the same for the narrower bracket; writes its keys, what each block has below it, and what each
                                           chunk can have at most: its weight below the bracket's upper end
    sampling_draw.py       rows            finds the threshold among them, and draws

So an unfiltered row's logits are read twice in all, with the pass for the maxima, and a filtered row's between two times (a peaked
distribution) and four times (a flat one).
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
    NUM_PIVOTS,
    NUM_ROUNDS,
    TOP_K,
    TOP_P,
    SamplingTables,
    SamplingWorkspace,
    load_number,
    load_parameter,
)
from penstock.execution.kernels.triton.sampling_keys import (
    UNIT,
    block_keys,
    first_bracket,
    first_pivots,
    masses_before,
    next_pivots,
    pivot_scale,
    second_bracket,
    store_chunk_masses,
    token_keys,
    token_weights,
)


def narrow_thresholds(
    logits: Tensor,
    slots: Tensor,
    pivots: Tensor,
    tables: SamplingTables,
    workspace: SamplingWorkspace,
    failed: Tensor,
    *,
    filtered: bool,
) -> None:
    """Fill the workspace with what sampling_draw.draw_tokens needs of rows with a temperature.

    logits: [M, V] as sampling.choose_largest left them; pivots: sampling_keys.pivot_distances; filtered: some row has top_k or top_p.
    """
    grid = (workspace.num_blocks, len(logits))
    vocab_size, stride = logits.shape[1], logits.stride(0)
    shared = (logits, slots, tables.parameters, workspace.maxima, failed, pivots, workspace.tallies)
    sizes = {"BLOCK": BLOCK, "NUM_ROUNDS": NUM_ROUNDS, "NUM_PIVOTS": NUM_PIVOTS}
    # Told the limit, ptxas does not spill for the sake of occupancy.
    _first_tally_kernel[grid](*shared, workspace.chunk_masses, vocab_size, stride, **sizes, num_warps=4, maxnreg=80)
    if not filtered:
        return
    _second_tally_kernel[grid](*shared, workspace.block_maxima, vocab_size, stride, **sizes, num_warps=4)
    _collect_kernel[grid](
        *shared,
        workspace.block_maxima,
        workspace.block_masses,
        workspace.chunk_masses,
        workspace.block_counts,
        workspace.candidate_counts,
        workspace.candidates,
        vocab_size,
        stride,
        **sizes,
        CAPACITY=CAPACITY,
        num_warps=8,
    )


@triton.jit
def _first_tally_kernel(
    logits, slots, parameters, maxima, failed, pivots, tallies, chunk_masses, vocab_size, stride,
    BLOCK: tl.constexpr, NUM_ROUNDS: tl.constexpr, NUM_PIVOTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    scale = load_number(parameters, slot, INVERSE_TEMPERATURE).to(tl.float32)
    if (scale == 0.0) | (tl.load(failed + row) != 0):
        return
    keys = block_keys(logits, row, stride, block, vocab_size, tl.load(maxima + row), scale, BLOCK)
    by_count = load_parameter(parameters, slot, TOP_K) < vocab_size
    if by_count | (load_number(parameters, slot, TOP_P) < 1.0):
        values = tl.where(by_count, 1.0, token_weights(keys))
        distance_scale = pivot_scale(by_count, scale)
        indices = tl.arange(0, NUM_PIVOTS)
        sums = tl.zeros([NUM_PIVOTS], tl.float32)
        for index in tl.static_range(NUM_PIVOTS):
            below = keys < first_pivots(pivots, index, distance_scale)
            sums += tl.where(indices == index, tl.sum(tl.where(below, values, 0.0), axis=0), 0.0)
        place = tallies + row * NUM_ROUNDS * NUM_PIVOTS + indices
        tl.atomic_add(place, (sums * UNIT).to(tl.int64), sem="relaxed")
    else:
        end = load_parameter(parameters, slot, END_KEY).to(tl.int32)
        store_chunk_masses(chunk_masses, row, block, masses_before(keys, end), BLOCK)


@triton.jit
def _second_tally_kernel(
    logits, slots, parameters, maxima, failed, pivots, tallies, block_maxima, vocab_size, stride,
    BLOCK: tl.constexpr, NUM_ROUNDS: tl.constexpr, NUM_PIVOTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    scale = load_number(parameters, slot, INVERSE_TEMPERATURE).to(tl.float32)
    top_k = load_parameter(parameters, slot, TOP_K)
    top_p = load_number(parameters, slot, TOP_P)
    unfiltered = (top_k >= vocab_size) & (top_p >= 1.0)
    if (scale == 0.0) | unfiltered | (tl.load(failed + row) != 0):
        return
    maximum = tl.load(maxima + row)
    end = load_parameter(parameters, slot, END_KEY).to(tl.int32)
    low, high, _ = first_bracket(
        pivots, tallies, row, top_k, top_p, end, vocab_size, scale, NUM_ROUNDS, NUM_PIVOTS
    )  # fmt: skip
    block_maximum = tl.load(block_maxima + row * tl.num_programs(0) + block)
    if token_keys(block_maximum, maximum, scale) >= high:
        return
    keys = block_keys(logits, row, stride, block, vocab_size, maximum, scale, BLOCK)
    values = tl.where(top_k < vocab_size, 1.0, token_weights(keys))
    indices = tl.arange(0, NUM_PIVOTS)
    sums = tl.zeros([NUM_PIVOTS], tl.float32)
    for index in tl.static_range(NUM_PIVOTS):
        below = keys < next_pivots(low, high, index, NUM_PIVOTS)
        sums += tl.where(indices == index, tl.sum(tl.where(below, values, 0.0), axis=0), 0.0)
    place = tallies + (row * NUM_ROUNDS + 1) * NUM_PIVOTS + indices
    tl.atomic_add(place, (sums * UNIT).to(tl.int64), sem="relaxed")


@triton.jit
def _collect_kernel(
    logits, slots, parameters, maxima, failed, pivots, tallies, block_maxima, block_masses,
    chunk_masses, block_counts, candidate_counts, candidates, vocab_size, stride,
    BLOCK: tl.constexpr, NUM_ROUNDS: tl.constexpr, NUM_PIVOTS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    scale = load_number(parameters, slot, INVERSE_TEMPERATURE).to(tl.float32)
    top_k = load_parameter(parameters, slot, TOP_K)
    top_p = load_number(parameters, slot, TOP_P)
    unfiltered = (top_k >= vocab_size) & (top_p >= 1.0)
    if (scale == 0.0) | unfiltered | (tl.load(failed + row) != 0):
        return
    maximum = tl.load(maxima + row)
    end = load_parameter(parameters, slot, END_KEY).to(tl.int32)
    low, high, goal = first_bracket(
        pivots, tallies, row, top_k, top_p, end, vocab_size, scale, NUM_ROUNDS, NUM_PIVOTS
    )  # fmt: skip
    low, high = second_bracket(
        low, high, goal, tallies, row, NUM_ROUNDS, NUM_PIVOTS
    )  # fmt: skip
    # With both filters top_p looks for its end among all that top_k leaves.
    floor = tl.where((top_k < vocab_size) & (top_p < 1.0), 0, low)
    place = row * tl.num_programs(0) + block
    count, count_below = 0, 0
    mass_below = tl.zeros([], tl.int64)
    masses = tl.zeros([BLOCK], tl.int64)
    if token_keys(tl.load(block_maxima + place), maximum, scale) < high:
        keys = block_keys(logits, row, stride, block, vocab_size, maximum, scale, BLOCK)
        count_below = tl.sum((keys < floor).to(tl.int32), axis=0)
        masses = masses_before(keys, high)
        mass_below = tl.sum(tl.where(keys < floor, masses, 0), axis=0)
        found = (keys >= floor) & (keys < high)
        places = tl.cumsum(found.to(tl.int32), axis=0) - 1
        tl.store(candidates + place * CAPACITY + places, keys, mask=found & (places < CAPACITY))
        count = tl.sum(found.to(tl.int32), axis=0)
    tl.store(candidate_counts + place, count)
    tl.store(block_counts + place, count_below)
    tl.store(block_masses + place, mass_below)
    store_chunk_masses(chunk_masses, row, block, masses, BLOCK)
