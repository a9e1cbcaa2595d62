"""Sampling of one row, written to be obviously right: Python loops over tokens, float64, integers for the random bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from penstock.core.types import SamplingParams

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(start: int, count: int) -> int:
    """Output number `count` of the SplitMix64 generator started at `start`, by walking there as the paper's code does."""
    state = start & MASK
    for _ in range(count + 1):
        state = (state + GAMMA) & MASK
    return mix(state)


def mix(value: int) -> int:
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def reference_start(seed: int, sample_index: int, position: int, stream: int = 0) -> int:
    """Where the random numbers of a position start."""
    return splitmix64(splitmix64(mix(seed), sample_index), 4 * position + stream)


def reference_uniform(start: int, number: int) -> float:
    """Random number `number` of a position: splitmix64(start, number), too far away to walk there."""
    return ((mix(start + (number + 1) * GAMMA) >> 12) + 0.5) / 2.0**52


def process(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int]
) -> list[float]:
    """Logits after penalties, biases and masks."""
    result = []
    stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    for token_id, logit in enumerate(logits):
        value = logit
        if token_id in prompt or token_id in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = list(output).count(token_id)
        value -= params.frequency_penalty * count
        value -= params.presence_penalty * (count > 0)
        value += params.logit_bias.get(token_id, 0.0)
        if params.allowed_token_ids is not None and token_id not in params.allowed_token_ids:
            value = -math.inf
        if len(output) < params.min_tokens and token_id in stop_ids:
            value = -math.inf
        result.append(value)
    return result


def kept_tokens(logits: Sequence[float], params: SamplingParams) -> tuple[list[int], float]:
    """Tokens that may be drawn, ascending, and how close the top_p decision was (infinity without one)."""
    scaled = [(logit - max(logits)) / params.temperature for logit in logits]
    kept = list(range(len(logits)))
    if params.top_k > 0:
        kept = [i for i in kept if sum(other > scaled[i] for other in scaled) < params.top_k]
    closest = math.inf
    if params.top_p < 1:
        total = sum(math.exp(scaled[i]) for i in kept)
        before = {i: sum(math.exp(scaled[j]) for j in kept if scaled[j] > scaled[i]) / total for i in kept}
        closest = min(abs(before[i] - params.top_p) for i in kept)
        kept = [i for i in kept if before[i] < params.top_p]
    if params.min_p > 0:
        closest = min(closest, *(abs(math.exp(scaled[i]) - params.min_p) for i in kept))
        kept = [i for i in kept if math.exp(scaled[i]) >= params.min_p]
    return kept, closest


def draw_token(logits: Sequence[float], kept: Sequence[int], temperature: float, start: int) -> tuple[int, float]:
    """The drawn token, and by how much of its time the winner of either race came before the next one."""
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in kept}
    chunks: dict[int, float] = {}
    for token_id, weight in weights.items():
        chunks[token_id // 128] = chunks.get(token_id // 128, 0.0) + weight
    chunk, chunk_lead = race(chunks, start, 0)
    inside = {token_id: weight for token_id, weight in weights.items() if token_id // 128 == chunk}
    token_id, lead = race(inside, start, 2**32)
    return token_id, min(chunk_lead, lead)


def race(weights: dict[int, float], start: int, first_number: int) -> tuple[int, float]:
    """Who comes in first, and how long before the next one, as a part of its own time (infinity alone)."""
    times = sorted(
        (-math.log(reference_uniform(start, first_number + entrant)) / weight, entrant)
        for entrant, weight in weights.items()
        if weight > 0
    )
    return times[0][1], times[1][0] / times[0][0] - 1 if len(times) > 1 else math.inf
