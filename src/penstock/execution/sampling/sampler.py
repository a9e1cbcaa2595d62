"""The sampler: logits of a step in, one token per request out, for any mix of sampling parameters.

Order of processing, each stage only for the rows that ask for it:

    repetition → frequency → presence penalty → logit_bias → allowed_token_ids → min_tokens
        → temperature → top_k → top_p → min_p → draw        (temperature 0: the largest logit)

Log-probabilities are those of the logits as they came. Results depend on a request's own row, parameters, tokens and position
only: not on the batch that it is in. Logits in main memory are sampled by one call of native kernels, others by torch's operators
(torch_sampler.py); both give the same tokens, except where sums of probabilities differ by rounding exactly at a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.sampling import can_read, sample_tokens
from penstock.execution.sampling.logprobs import LogprobRows, token_logprobs
from penstock.execution.sampling.requests import SamplingRequests
from penstock.execution.sampling.torch_sampler import torch_tokens

IntArray = npt.NDArray[np.int64]

_NO_ROWS: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class SampledRows:
    """One step's tokens.

    token_ids: int64 [M]; 0 in failed rows.
    failed: bool [M], rows that have no distribution: NaN or infinite logits, or every token forbidden.
    logprob_rows: which of the M rows asked for log-probabilities; logprobs: theirs, in that order, with num_top alternatives each.
    """

    token_ids: IntArray
    failed: npt.NDArray[np.bool_]
    logprob_rows: IntArray
    logprobs: LogprobRows | None
    num_top: list[int]


class Sampler:
    """Sampling state of up to `max_slots` requests, and the sampling of any subset of them.

    A slot is a small integer that the caller gives to a request.
    """

    def __init__(
        self, vocab_size: int, max_slots: int, device: torch.device, eos_token_ids: tuple[int, ...] = ()
    ) -> None:
        self.vocab_size = vocab_size
        self._device = device
        self._requests = SamplingRequests(vocab_size, max_slots, eos_token_ids)

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
        self._requests.add(slot, params, seed=seed, sample_index=sample_index, prompt=prompt, output=output)

    def remove(self, slot: int) -> None:
        """Forget a request."""
        self._requests.remove(slot)

    def sample(self, logits: Tensor, slots: IntArray, positions: IntArray) -> SampledRows:
        """Sample one token for each of `slots` and count it as output.

        logits: float32 [M, V], may be overwritten; slots: distinct slots [M]; positions [M]: index of the token being sampled in its
        sequence (prompt and output).
        """
        requests = self._requests
        num_top = requests.num_top[slots]
        edited = requests.edited[slots]
        logprob_rows = np.flatnonzero(num_top >= 0) if num_top.max() >= 0 else _NO_ROWS
        raw, raw_rows = logits, logprob_rows
        if edited[logprob_rows].any():
            raw, raw_rows = logits[torch.from_numpy(logprob_rows).to(logits.device)], np.arange(len(logprob_rows))
        if native_available() and can_read(logits):
            token_ids, failed = sample_tokens(logits, requests.records, slots, positions)
        else:
            token_ids, failed = torch_tokens(logits, requests, slots, positions)
        if edited.any():
            rows = np.flatnonzero(requests.penalised[slots])
            requests.count(slots[rows], token_ids[rows])
        if not len(logprob_rows):
            return SampledRows(token_ids, failed, logprob_rows, None, [])
        wanted: list[int] = num_top[logprob_rows].tolist()
        logprobs = token_logprobs(raw, token_ids[logprob_rows], max(wanted), raw_rows)
        return SampledRows(token_ids, failed, logprob_rows, logprobs, wanted)
