"""Numbers that the kernels of random sampling share: keys, weights, random bits, and the bracket around a threshold.

A token's *key* is the bit pattern of (maximum - logit) * scale, where scale = 1 / temperature. That is not negative, so keys order tokens
as these numbers do, from 0 (the most likely) to that of infinity. Weights are integers, multiples of 2**-42 of the largest: their sums do
not depend on the order of addition.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

# Distances below the maximum, in nats of the scaled distribution; for rows with top_k in logits, since their number does not depend
# on temperature. The last is the end of everything.
PIVOT_DISTANCES = (1.0, 2.0, 3.5, 5.5, 8.0, 12.0, 20.0, math.inf)

_INFINITY = 0x7F800000
_INFINITE_KEY = tl.constexpr(_INFINITY)
PAST_KEYS = tl.constexpr(_INFINITY + 1)
UNIT = tl.constexpr(2.0**42)
# Tokens that race with each other, and the number of token 0's random number, as in sampling/draw.py.
CHUNK = tl.constexpr(128)
FIRST_TOKEN = tl.constexpr(2**32)
# SplitMix64's, as signed integers.
_GAMMA = tl.constexpr(-0x61C8864680B583EB)


def end_key(min_p: float) -> int:
    """The key at which what min_p keeps ends; 0: off."""
    if min_p <= 0.0:
        return _INFINITY + 1
    return int(struct.unpack("<i", struct.pack("<f", max(0.0, -math.log(min_p))))[0]) + 1


def pivot_distances(device: torch.device) -> Tensor:
    """PIVOT_DISTANCES, float32 on the device."""
    return torch.tensor(PIVOT_DISTANCES, dtype=torch.float32, device=device)


@triton.jit
def _mix(bits):
    # SplitMix64, on signed 64-bit integers that wrap; see sampling/random.py.
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)


@triton.jit
def position_start(key, position):
    """Where the random numbers of a position start."""
    return _mix(key + (position * 4 + 1) * _GAMMA)


@triton.jit
def arrival_times(start, numbers, masses):
    """When entrants of a race come in, float64: exponential random numbers over weights as integers; infinity without weight."""
    bits = _mix(start + (numbers.to(tl.int64) + 1) * _GAMMA)
    uniforms = (((bits >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return tl.where(masses > 0, -tl.log(uniforms) / tl.maximum(masses, 1).to(tl.float64), float("inf"))


@triton.jit
def token_keys(values, maximum, scale):
    return ((maximum - values) * scale).to(tl.int32, bitcast=True)


@triton.jit
def token_weights(keys):
    """float32 weights, at most 1."""
    return tl.exp(-tl.minimum(keys, _INFINITE_KEY).to(tl.float32, bitcast=True))


@triton.jit
def token_masses(keys):
    """Weights as integers."""
    return (token_weights(keys) * UNIT).to(tl.int64)


@triton.jit
def masses_before(keys, end):
    """Weights as integers of the keys below an end, 0 for the others."""
    return tl.where(keys < end, token_masses(keys), 0)


@triton.jit
def store_chunk_masses(chunk_masses, row, block, masses, BLOCK: tl.constexpr):
    """The sums of a block's chunks."""
    chunks: tl.constexpr = BLOCK // CHUNK
    place = chunk_masses + (row * tl.num_programs(0) + block) * chunks + tl.arange(0, chunks)
    tl.store(place, tl.sum(tl.reshape(masses, [chunks, CHUNK]), axis=1))


@triton.jit
def block_keys(logits, row, stride, block, vocab_size, maximum, scale, BLOCK: tl.constexpr):
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    values = tl.load(logits + row * stride + tokens, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where(inside, token_keys(values, maximum, scale), PAST_KEYS)


@triton.jit
def pivot_scale(by_count, scale):
    """What turns distances into scaled ones."""
    return tl.where(by_count, scale, 1.0)


@triton.jit
def first_pivots(pivots, indices, scale):
    """Keys just above the scaled distances, so that the last is above everything."""
    return (tl.load(pivots + indices) * scale).to(tl.int32, bitcast=True) + 1


@triton.jit
def next_pivots(low, high, indices, NUM_PIVOTS: tl.constexpr):
    """Keys of evenly spaced distances from `low` to `high`; of an open bracket the near part is divided. The last is `high`."""
    near = low.to(tl.float32, bitcast=True)
    far = tl.minimum(tl.minimum(high, _INFINITE_KEY).to(tl.float32, bitcast=True), 4.0 * near + 8.0)
    keys = (near + (far - near) * ((indices + 1) * (1.0 / NUM_PIVOTS))).to(tl.int32, bitcast=True)
    return tl.where(indices == NUM_PIVOTS - 1, high, tl.minimum(tl.maximum(keys, low), high))


@triton.jit
def first_bracket(
    pivots, tallies, row, top_k, top_p, end, vocab_size, scale,
    NUM_ROUNDS: tl.constexpr, NUM_PIVOTS: tl.constexpr,
):  # fmt: skip
    """Keys between which the first filter ends, as the first tally tells: low, high; and its goal, in the tally's units. Nothing is kept
    from `end` on."""
    by_count = top_k < vocab_size
    indices = tl.arange(0, NUM_PIVOTS)
    keys = first_pivots(pivots, indices, pivot_scale(by_count, scale))
    sums = tl.load(tallies + row * NUM_ROUNDS * NUM_PIVOTS + indices).to(tl.float64)
    goal = tl.where(by_count, top_k.to(tl.float64) * UNIT, top_p * tl.max(sums, axis=0))
    passed = sums < goal
    low = tl.max(tl.where(passed, keys, 0), axis=0)
    high = tl.min(tl.where(passed, PAST_KEYS, keys), axis=0)
    # With both filters top_p needs all that top_k leaves; else what lies from `end` on is of no interest.
    high = tl.where(by_count & (top_p < 1.0), high, tl.minimum(high, end))
    return tl.minimum(low, high), high, goal


@triton.jit
def second_bracket(
    low, high, goal, tallies, row,
    NUM_ROUNDS: tl.constexpr, NUM_PIVOTS: tl.constexpr,
):  # fmt: skip
    """The bracket after the second tally."""
    indices = tl.arange(0, NUM_PIVOTS)
    keys = next_pivots(low, high, indices, NUM_PIVOTS)
    passed = tl.load(tallies + (row * NUM_ROUNDS + 1) * NUM_PIVOTS + indices).to(tl.float64) < goal
    # The last pivot is `high` itself; it may pass where high is `end`.
    inner = indices < NUM_PIVOTS - 1
    new_low = tl.max(tl.where(passed & inner, keys, low), axis=0)
    new_high = tl.min(tl.where(passed, high, keys), axis=0)
    return new_low, new_high
