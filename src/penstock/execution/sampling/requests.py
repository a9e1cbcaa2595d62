"""What sampling remembers of each request: its parameters and the tokens that they treat in a special way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from penstock.core.types import SamplingParams
from penstock.execution.kernels.sampling import SAMPLING_SLOT
from penstock.execution.sampling.masks import biases, forbidden_before_end
from penstock.execution.sampling.penalties import count_tokens, uses_penalties
from penstock.execution.sampling.random import stream_keys
from penstock.execution.sampling.token_lists import TokenLists


class SamplingRequests:
    """Up to `max_slots` requests, one record each, laid out as native kernels read them.

    records: SAMPLING_SLOT [max_slots]. used: tokens of prompt and output with their number in the output, for requests with penalties.
    biased: logit_bias, and allowed_token_ids where `only_biased` is set. stops: tokens forbidden before `end_position`.
    num_top int64 [max_slots]: alternatives wanted beside the chosen token; -1: no log-probabilities.
    penalised, edited: bool [max_slots]: has penalties; may have logits changed before a token is chosen.
    """

    def __init__(self, vocab_size: int, max_slots: int, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self.records: npt.NDArray[np.void] = np.zeros(max_slots, dtype=SAMPLING_SLOT)
        self.used = TokenLists(self.records["used"])
        self.biased = TokenLists(self.records["biased"])
        self.stops = TokenLists(self.records["stops"])
        self.num_top: npt.NDArray[np.int64] = np.full(max_slots, -1, dtype=np.int64)
        self.penalised: npt.NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)
        self.edited: npt.NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)

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
        record = self.records[slot]
        record["temperature"] = params.temperature
        record["top_k"] = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        record["top_p"], record["min_p"] = params.top_p, params.min_p
        record["key"] = stream_keys(torch.tensor([seed]), torch.tensor([sample_index])).item()
        record["presence"], record["frequency"] = params.presence_penalty, params.frequency_penalty
        record["repetition"] = params.repetition_penalty
        self.num_top[slot] = -1 if params.logprobs is None else params.logprobs
        if uses_penalties(params):
            self.penalised[slot] = self.edited[slot] = True
            self.used.set(slot, *count_tokens(prompt, output, self._vocab_size))
        if params.logit_bias or params.allowed_token_ids is not None:
            biased = biases(params, self._vocab_size)
            self.edited[slot] = True
            self.biased.set(slot, list(biased), list(biased.values()))
            record["only_biased"] = params.allowed_token_ids is not None
        stops = forbidden_before_end(params, self._eos_token_ids, self._vocab_size)
        if stops:
            self.edited[slot] = True
            self.stops.set(slot, stops, [0.0] * len(stops))
            record["end_position"] = len(prompt) + params.min_tokens

    def remove(self, slot: int) -> None:
        """Forget a request and release its lists."""
        if self.edited[slot]:
            for lists in (self.used, self.biased, self.stops):
                lists.clear(slot)
            self.records["only_biased"][slot] = 0
            self.records["end_position"][slot] = 0
            self.penalised[slot] = self.edited[slot] = False
        self.num_top[slot] = -1

    def count(self, slots: npt.NDArray[np.int64], token_ids: npt.NDArray[np.int64]) -> None:
        """Count one new output token for each of `slots`, all of which have penalties."""
        for slot, token_id in zip(slots.tolist(), token_ids.tolist(), strict=True):
            self.used.add_one(slot, token_id)
