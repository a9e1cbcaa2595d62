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


def reference_uniform(seed: int, sample_index: int, position: int, stream: int = 0) -> float:
    key = splitmix64(mix(seed), sample_index)
    return ((splitmix64(key, 4 * position + stream) >> 12) + 0.5) / 2.0**52


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


def draw_token(logits: Sequence[float], kept: Sequence[int], temperature: float, uniform: float) -> tuple[int, float]:
    """The drawn token, and how close the number was to another one's part of the distribution."""
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in kept}
    goal = uniform * sum(weights.values())
    passed, closest, chosen = 0.0, math.inf, -1
    for token_id in kept:
        passed += weights[token_id]
        closest = min(closest, abs(passed - goal) / sum(weights.values()))
        if passed > goal and chosen < 0:
            chosen = token_id
    return chosen, closest
