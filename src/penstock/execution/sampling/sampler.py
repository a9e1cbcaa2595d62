"""The sampler: logits of a step in, one token per request out, for any mix of sampling parameters.

Order of processing, each stage only for the rows that ask for it:

    repetition → frequency → presence penalty → logit_bias → allowed_token_ids → min_tokens
        → temperature → top_k → top_p → min_p → draw        (temperature 0: the largest logit)

Log-probabilities are those of the logits as they came. Results depend on a request's own row, parameters, tokens and position
only: not on the batch that it is in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.sampling.draw import draw, row_maxima
from penstock.execution.sampling.filters import min_p_thresholds, scale_logits, thresholds
from penstock.execution.sampling.logprobs import LogprobRows, token_logprobs
from penstock.execution.sampling.masks import BiasState, MinTokensState
from penstock.execution.sampling.penalties import PenaltyState, uses_penalties
from penstock.execution.sampling.random import Stream, stream_keys, uniforms

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampledRows:
    """One step's tokens.

    token_ids: int64 [M]; meaningless in failed rows.
    failed: bool [M], rows that have no distribution: NaN or infinite logits, or every token forbidden.
    logprob_rows: which of the M rows asked for log-probabilities; logprobs: theirs, in that order, with num_top alternatives each.
    """

    token_ids: Tensor
    failed: Tensor
    logprob_rows: IntArray
    logprobs: LogprobRows | None
    num_top: list[int]


class Sampler:
    """Sampling state of up to `max_slots` requests, and the sampling of any subset of them.

    A slot is a small integer that the caller gives to a request. Penalties and biases take vocabulary-sized rows, but only for requests
    that use them.
    """

    def __init__(
        self, vocab_size: int, max_slots: int, device: torch.device, eos_token_ids: tuple[int, ...] = ()
    ) -> None:
        self.vocab_size = vocab_size
        self._device = device
        self._temperature: npt.NDArray[np.float32] = np.zeros(max_slots, dtype=np.float32)
        self._top_k: IntArray = np.full(max_slots, vocab_size, dtype=np.int64)
        self._top_p: npt.NDArray[np.float64] = np.ones(max_slots, dtype=np.float64)
        self._min_p: npt.NDArray[np.float64] = np.zeros(max_slots, dtype=np.float64)
        self._keys: IntArray = np.zeros(max_slots, dtype=np.int64)
        # Alternatives wanted beside the chosen token; -1: no log-probabilities.
        self._num_top: IntArray = np.full(max_slots, -1, dtype=np.int64)
        self._penalised: npt.NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)
        self._biased: npt.NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)
        self._penalties = PenaltyState(vocab_size, max_slots, device)
        self._biases = BiasState(vocab_size, max_slots, device)
        self._min_tokens = MinTokensState(vocab_size, max_slots, device, eos_token_ids)

    def add(
        self,
        slot: int,
        params: SamplingParams,
        *,
        seed: int,
        sample_index: int,
        prompt: npt.NDArray[np.int32],
        output: npt.NDArray[np.int32],
    ) -> None:
        """Start a request in `slot`, replacing what was there. `output`: what it has generated so far, when it was resumed."""
        self.remove(slot)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._keys[slot] = stream_keys(torch.tensor([seed]), torch.tensor([sample_index])).item()
        self._num_top[slot] = -1 if params.logprobs is None else params.logprobs
        self._biased[slot] = self._biases.add(slot, params)
        self._min_tokens.add(slot, params, len(prompt))
        if uses_penalties(params):
            self._penalised[slot] = True
            self._penalties.add(slot, params, prompt, output)

    def remove(self, slot: int) -> None:
        """Forget a request and give its rows back."""
        if self._penalised[slot]:
            self._penalties.remove(slot)
        if self._biased[slot]:
            self._biases.remove(slot)
        self._min_tokens.remove(slot)
        self._penalised[slot] = self._biased[slot] = False
        self._num_top[slot] = -1

    def sample(self, logits: Tensor, slots: IntArray, positions: IntArray) -> SampledRows:
        """Sample one token for each of `slots` and count it as output.

        logits: float32 [M, V], may be overwritten; slots: distinct slots [M]; positions [M]: index of the token being sampled in its
        sequence (prompt and output).
        """
        num_top = self._num_top[slots]
        logprob_rows = np.flatnonzero(num_top >= 0)
        raw = logits[self._tensor(logprob_rows)] if len(logprob_rows) else None
        logits = self._process(logits, slots, positions)
        maxima, token_ids = row_maxima(logits)
        # NaN and infinity survive every stage, and a row of nothing but forbidden tokens has a maximum of minus infinity.
        failed = ~torch.isfinite(maxima.squeeze(1))
        random_rows = np.flatnonzero(self._temperature[slots] > 0)
        if len(random_rows) == len(slots):
            token_ids = self._draw(logits, maxima, slots, positions)
        elif len(random_rows):
            index = self._tensor(random_rows)
            token_ids[index] = self._draw(logits[index], maxima[index], slots[random_rows], positions[random_rows])
        token_ids = token_ids.masked_fill(failed, 0)
        self._count(slots, token_ids)
        logprobs = None
        wanted: list[int] = num_top[logprob_rows].tolist()
        if raw is not None:
            logprobs = token_logprobs(raw, token_ids[self._tensor(logprob_rows)], max(wanted))
        return SampledRows(token_ids, failed, logprob_rows, logprobs, wanted)

    def _process(self, logits: Tensor, slots: IntArray, positions: IntArray) -> Tensor:
        """Penalties, biases and masks, in the documented order."""
        stages = (
            (self._penalised[slots], self._penalties.apply),
            (self._biased[slots], self._biases.apply),
            (positions < self._min_tokens.end_positions[slots], self._min_tokens.apply),
        )
        for needed, apply in stages:
            if needed.all():
                logits = apply(logits, slots)
            elif needed.any():
                rows = np.flatnonzero(needed)
                index = self._tensor(rows)
                logits[index] = apply(logits[index], slots[rows])
        return logits

    def _draw(self, logits: Tensor, maxima: Tensor, slots: IntArray, positions: IntArray) -> Tensor:
        """Random tokens, int64 [M], from processed logits [M, V] and their maxima [M, 1]."""
        scaled = scale_logits(logits, maxima, self._tensor(self._temperature[slots]))
        weights = scaled.exp()
        top_k, top_p, min_p = self._top_k[slots], self._top_p[slots], self._min_p[slots]
        smallest = None
        if (top_k < self.vocab_size).any() or (top_p < 1.0).any():
            smallest = thresholds(scaled, weights, self._tensor(top_k), self._tensor(top_p), self._tensor(min_p))
        elif min_p.any():
            smallest = min_p_thresholds(self._tensor(min_p))
        if smallest is not None:
            weights.masked_fill_(scaled < smallest.unsqueeze(1), 0.0)
        numbers = uniforms(self._tensor(self._keys[slots]), self._tensor(positions), Stream.SAMPLE)
        return draw(weights, numbers)

    def _count(self, slots: IntArray, token_ids: Tensor) -> None:
        rows = np.flatnonzero(self._penalised[slots])
        if len(rows):
            self._penalties.count(slots[rows], token_ids[self._tensor(rows)])

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
