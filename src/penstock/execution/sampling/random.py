"""Random numbers as a pure function of (seed, sample index, position, stream, number).

Nothing is stored and nothing is consumed: a request that is preempted, resumed on another engine, or scheduled in another batch
draws the same numbers at the same positions. The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), which allows random access: its n-th output is mix(start + (n + 1) * GAMMA).

    key(seed, sample_index)      = output number sample_index of the generator started at mix(seed)
    start(key, position, stream) = output number position * NUM_STREAMS + stream of the generator started at key
    uniform(start, number)       = output number `number` of the generator started at start, as a number between 0 and 1

Only wrapping 64-bit integer arithmetic, and one exact conversion to float64: the same bits on every device.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

NUM_STREAMS = 4


class Stream(IntEnum):
    """What numbers are drawn for. One position may need several independent series; there is room for NUM_STREAMS of them.

    Verifying drafts needs none of its own: it draws what plain decoding draws."""

    SAMPLE = 0


def _signed(value: int) -> int:
    """The 64 bits of `value` as torch's int64 reads them."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def stream_keys(seeds: Tensor, sample_indices: Tensor) -> Tensor:
    """Keys, int64 [M], of seeds and sample indices, int64 [M]."""
    return _mix(_mix(seeds) + (sample_indices + 1) * _GAMMA)


def position_starts(keys: Tensor, positions: Tensor, stream: Stream = Stream.SAMPLE) -> Tensor:
    """Where the numbers of one position and stream start, int64 [M], for keys and positions, int64 [M]."""
    return _mix(keys + (positions * NUM_STREAMS + (int(stream) + 1)) * _GAMMA)


def uniforms(starts: Tensor, numbers: Tensor) -> Tensor:
    """Random numbers strictly between 0 and 1, float64, for starts and numbers, int64 of shapes that go together."""
    bits = _mix(starts + (numbers + 1) * _GAMMA)
    # 52 bits, so that the added half is exact and neither 0 nor 1 can come out.
    return (_shift_right(bits, 12).to(torch.float64) + 0.5) * 2.0**-52


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift; torch's >> on int64 repeats the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
