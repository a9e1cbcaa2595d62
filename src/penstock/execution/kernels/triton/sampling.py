"""Tokens from logits, where the logits are: the largest logit of each row, after penalties, biases and masks.

A row of V logits is cut into blocks of `BLOCK` tokens, one program each, so that one row alone already keeps 75 multiprocessors busy at
V = 152k, and a batch streams through them. The kernels, in order, with the bytes that each moves per row (b: bytes per logit):

    _maxima_kernel    rows x blocks   reads V * b (edited rows also 2 V of token states and 4 V of biases where they have them, and
                                      write 4 V), writes a maximum per block
    _choose_kernel    rows            reads the blocks' maxima; the token of greedy rows, the maximum of the others
    then, only when a row is random, sampling_filters.py and sampling_draw.py

Which branch a row takes is read from its slot's parameters on the device: grids depend on shapes only. The twin is
sampling/torch_sampler.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.execution.kernels.triton.sampling_keys import CHUNK

# Tokens per program: two or four loads of 16 bytes per thread, all in flight at once.
BLOCK = 2048
# Thresholds are narrowed down in so many rounds, with so many pivots each; see sampling_filters.py.
NUM_ROUNDS = 2
NUM_PIVOTS = 8
# Candidates that one block of tokens may hand to the search for thresholds.
CAPACITY = 512
# Weights are added as integers, in units of this; sums of 2 ** MAX_VOCAB_BITS weights fit into 63 bits.
MAX_VOCAB_BITS = 20

# What a slot's parameters are on the device, one 64-bit word each. inverse_temperature: 0 for greedy; end_key: see sampling_keys.py;
# state_row, bias_row: rows of the pools, -1 for none. Token states are int16: bit 0: used in prompt or output; bit 1: forbidden before
# end_position; from bit 2 on the times it is in the output.
SAMPLING_PARAMETERS = np.dtype(
    [
        ("inverse_temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("end_key", np.int64),
        ("key", np.int64),
        ("state_row", np.int64),
        ("bias_row", np.int64),
        ("end_position", np.int64),
        ("presence", np.float64),
        ("frequency", np.float64),
        ("repetition", np.float64),
        ("unused", np.int64, 5),
    ]
)
PARAMETER_WORDS = SAMPLING_PARAMETERS.itemsize // 8
STATE_USED, STATE_FORBIDDEN, STATE_COUNT_SHIFT = 1, 2, 2
MAX_STATE_COUNT = 2**13 - 1

_WORDS = tl.constexpr(PARAMETER_WORDS)
INVERSE_TEMPERATURE, TOP_K, TOP_P, END_KEY, KEY = (tl.constexpr(word) for word in range(5))
_STATE_ROW, _BIAS_ROW, _END_POSITION, _PRESENCE, _FREQUENCY, _REPETITION = (tl.constexpr(word) for word in range(5, 11))
_FORBIDDEN = tl.constexpr(STATE_FORBIDDEN)
_SHIFT = tl.constexpr(STATE_COUNT_SHIFT)
_ONCE = tl.constexpr(1 << STATE_COUNT_SHIFT)
_FULL = tl.constexpr(MAX_STATE_COUNT << STATE_COUNT_SHIFT)


@dataclass(frozen=True)
class SamplingTables:
    """What kernels read of requests. parameters: int64 [max_slots, PARAMETER_WORDS], SAMPLING_PARAMETERS; states: int16 [rows, stride];
    biases: float32 [rows, stride], minus infinity for tokens that are not allowed. Strides are V rounded up to whole blocks."""

    parameters: Tensor
    states: Tensor
    biases: Tensor


class SamplingWorkspace:
    """Memory of the kernels for up to `rows` rows; a bit more than a quarter of the bytes of float32 logits."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        blocks = triton.cdiv(vocab_size, BLOCK)
        self.rows, self.num_blocks = rows, blocks
        self.block_maxima = torch.empty(rows, blocks, device=device)
        self.block_tokens = torch.empty(rows, blocks, dtype=torch.int32, device=device)
        self.maxima = torch.empty(rows, device=device)
        self.block_masses = torch.empty(rows, blocks, dtype=torch.int64, device=device)
        self.chunk_masses = torch.empty(rows, blocks * (BLOCK // CHUNK.value), dtype=torch.int64, device=device)
        self.block_counts = torch.empty(rows, blocks, dtype=torch.int32, device=device)
        self.tallies = torch.empty(rows, NUM_ROUNDS, NUM_PIVOTS, dtype=torch.int64, device=device)
        self.candidate_counts = torch.empty(rows, blocks, dtype=torch.int32, device=device)
        self.candidates = torch.empty(rows, blocks, CAPACITY, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class SampledTokens:
    """token_ids: int64 [M]; failed: uint8 [M], 1 where a row has no distribution (its token is 0)."""

    token_ids: Tensor
    failed: Tensor


def choose_largest(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    tables: SamplingTables,
    workspace: SamplingWorkspace,
    *,
    edit: bool,
    count: bool,
) -> SampledTokens:
    """The first of the largest logits of each row; rows with a temperature get theirs from sampling_draw.draw_tokens afterwards.

    logits: [M, V], columns adjacent; float32 when `edit` (rows whose slots have penalties, biases or masks are changed in place), else
    also 16-bit. slots, positions: int64 [M]; rows with a negative slot fail. count: count the tokens of greedy rows as output.
    """
    rows, vocab_size = logits.shape
    sampled = SampledTokens(
        torch.empty(rows, dtype=torch.int64, device=logits.device),
        torch.empty(rows, dtype=torch.uint8, device=logits.device),
    )
    blocks = workspace.num_blocks
    _maxima_kernel[(blocks, rows)](
        logits,
        slots,
        positions,
        tables.parameters,
        tables.states,
        tables.biases,
        workspace.block_maxima,
        workspace.block_tokens,
        vocab_size,
        logits.stride(0),
        EDIT=edit,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # a penalty's product is rounded before it is subtracted, as everywhere else
    )
    _choose_kernel[(rows,)](
        slots,
        tables.parameters,
        tables.states,
        workspace.block_maxima,
        workspace.block_tokens,
        workspace.maxima,
        workspace.tallies,
        sampled.token_ids,
        sampled.failed,
        vocab_size,
        blocks,
        COUNT=count,
        PADDED_BLOCKS=triton.next_power_of_2(blocks),
        BLOCK=BLOCK,
        NUM_TALLIES=NUM_ROUNDS * NUM_PIVOTS,
        num_warps=1,
    )
    return sampled


@triton.jit
def load_parameter(parameters, slot, WORD: tl.constexpr):
    return tl.load(parameters + slot * _WORDS + WORD)


@triton.jit
def load_number(parameters, slot, WORD: tl.constexpr):
    return tl.load(parameters + slot * _WORDS + WORD).to(tl.float64, bitcast=True)


@triton.jit
def has_nan(values):
    return tl.max((values != values).to(tl.int32), axis=0) != 0  # noqa: PLR0124


@triton.jit
def without_nan(values):
    return tl.where(values == values, values, -float("inf"))  # noqa: PLR0124


@triton.jit
def count_token(states, parameters, slot, token, vocab_size, BLOCK: tl.constexpr):
    """Add one output token to the states of a slot, if it has any; the count stays at its largest value."""
    state_row = load_parameter(parameters, slot, _STATE_ROW)
    if state_row >= 0:
        place = states + state_row * tl.cdiv(vocab_size, BLOCK) * BLOCK + token
        state = tl.load(place).to(tl.int32) | 1
        tl.store(place, tl.where(state < _FULL, state + _ONCE, state).to(tl.int16))


@triton.jit
def _edited(values, tokens, inside, position, slot, parameters, states, biases, padded_size):
    """Logits of one block after penalties, biases and masks, in this order."""
    state_row = load_parameter(parameters, slot, _STATE_ROW)
    bias_row = load_parameter(parameters, slot, _BIAS_ROW)
    state = tl.zeros_like(tokens)
    if state_row >= 0:
        state = tl.load(states + state_row * padded_size + tokens, mask=inside, other=0).to(tl.int32)
        presence = load_number(parameters, slot, _PRESENCE).to(tl.float32)
        frequency = load_number(parameters, slot, _FREQUENCY).to(tl.float32)
        repetition = load_number(parameters, slot, _REPETITION).to(tl.float32)
        times = state >> _SHIFT
        repeated = tl.where(values > 0, tl.div_rn(values, repetition + tl.zeros_like(values)), values * repetition)
        penalised = repeated - times.to(tl.float32) * frequency
        penalised = tl.where(times > 0, penalised - presence, penalised)
        values = tl.where((state & 1) != 0, penalised, values)
    if bias_row >= 0:
        values += tl.load(biases + bias_row * padded_size + tokens, mask=inside, other=0.0)
    if position < load_parameter(parameters, slot, _END_POSITION):
        values = tl.where((state & _FORBIDDEN) != 0, -float("inf"), values)
    return values


@triton.jit
def _maxima_kernel(
    logits, slots, positions, parameters, states, biases, block_maxima, block_tokens, vocab_size, stride,
    EDIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    place = logits + row * stride + tokens
    values = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32)
    if EDIT:
        has_states = load_parameter(parameters, slot, _STATE_ROW) >= 0
        if has_states | (load_parameter(parameters, slot, _BIAS_ROW) >= 0):
            padded_size = tl.num_programs(0) * BLOCK
            position = tl.load(positions + row)
            values = _edited(values, tokens, inside, position, slot, parameters, states, biases, padded_size)
            values = tl.where(inside, values, -float("inf"))
            tl.store(place, values, mask=inside)
    is_nan = has_nan(values)
    largest = tl.max(without_nan(values), axis=0)
    first = tl.min(tl.where(values == largest, tokens, vocab_size), axis=0)
    place = row * tl.num_programs(0) + block
    tl.store(block_maxima + place, tl.where(is_nan, float("nan"), largest))
    tl.store(block_tokens + place, first)


@triton.jit
def _choose_kernel(
    slots, parameters, states, block_maxima, block_tokens, maxima, tallies, token_ids, failed,
    vocab_size, num_blocks,
    COUNT: tl.constexpr, PADDED_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NUM_TALLIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        tl.store(token_ids + row, 0)
        tl.store(failed + row, 1)
        return
    blocks = tl.arange(0, PADDED_BLOCKS)
    inside = blocks < num_blocks
    values = tl.load(block_maxima + row * num_blocks + blocks, mask=inside, other=-float("inf"))
    tokens = tl.load(block_tokens + row * num_blocks + blocks, mask=inside, other=vocab_size)
    largest = tl.max(without_nan(values), axis=0)
    token = tl.min(tl.where(values == largest, tokens, vocab_size), axis=0)
    has_failed = has_nan(values) | (largest == float("inf")) | (largest == -float("inf"))
    token = tl.where(has_failed, 0, token).to(tl.int64)
    tl.store(maxima + row, largest)
    tl.store(token_ids + row, token)
    tl.store(failed + row, has_failed.to(tl.uint8))
    tl.store(tallies + row * NUM_TALLIES + tl.arange(0, NUM_TALLIES), tl.zeros([NUM_TALLIES], tl.int64))
    # Rows that are drawn are counted when they are; failed ones here.
    if COUNT:  # noqa: SIM102, at compile time
        if has_failed | (load_number(parameters, slot, INVERSE_TEMPERATURE) == 0.0):
            count_token(states, parameters, slot, token, vocab_size, BLOCK)
