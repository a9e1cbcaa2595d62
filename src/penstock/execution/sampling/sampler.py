"""The sampler: logits of a step in, one token per request out, for any mix of sampling parameters.

Order of processing, each stage only for the rows that ask for it:

    repetition → frequency → presence penalty → logit_bias → allowed_token_ids → min_tokens → masks of a grammar
        → temperature → top_k → top_p → min_p → draw        (temperature 0: the largest logit)

A mask is written into the logits first of all, because minus infinity stays what it is in all the stages before temperature.

Drafts are verified by sampling behind each of them with the random number of its position, as without drafts, and comparing: what
comes out is token for token what plain decoding gives (execution/speculative/coupling.py says why). Rows of a request without
penalties do not depend on each other and are sampled at once; with penalties row i + 1 waits until the token of row i is counted.

Log-probabilities are those of the logits as they came. Results depend on a request's own row, parameters, tokens and position
only: not on the batch that it is in. Logits in main memory are sampled by one call of native kernels, others by torch's operators
(torch_sampler.py); both give the same tokens, except where sums of probabilities differ by rounding exactly at a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams, TokenLogprobs
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.sampling import can_read, sample_tokens
from penstock.execution.sampling.logprobs import LogprobRows, token_logprobs
from penstock.execution.sampling.masks import TokenMasks, forbid
from penstock.execution.sampling.requests import SamplingRequests
from penstock.execution.sampling.torch_sampler import torch_tokens
from penstock.execution.sampling.verification import DraftRows, VerifiedTokens

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_NO_ROWS: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class SampledRows:
    """One step's tokens.

    token_ids: int64 [M]; 0 in failed rows.
    failed: bool [M], rows that have no distribution: NaN or infinite logits, or every token forbidden.
    logprob_rows: which of the M rows asked for log-probabilities; logprobs: theirs, in that order, with num_top alternatives each.
    """

    token_ids: IntArray
    failed: BoolArray
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

    def sample(
        self, logits: Tensor, slots: IntArray, positions: IntArray, masks: TokenMasks | None = None
    ) -> SampledRows:
        """Sample one token for each of `slots` and count it as output.

        logits: float32 [M, V], may be overwritten; slots: distinct slots [M]; positions [M]: index of the token being sampled in its
        sequence (prompt and output).
        """
        requests = self._requests
        num_top = requests.num_top[slots]
        edited = requests.edited[slots]
        logprob_rows = np.flatnonzero(num_top >= 0) if num_top.max() >= 0 else _NO_ROWS
        raw, raw_rows = logits, logprob_rows
        if masks is not None or edited[logprob_rows].any():
            raw, raw_rows = _rows_of(logits, logprob_rows), np.arange(len(logprob_rows))
        if masks is not None:
            forbid(logits, masks)
        token_ids, failed = self._choose(logits, slots, positions)
        if edited.any():
            rows = np.flatnonzero(requests.penalised[slots])
            requests.count(slots[rows], token_ids[rows])
        if not len(logprob_rows):
            return SampledRows(token_ids, failed, logprob_rows, None, [])
        wanted: list[int] = num_top[logprob_rows].tolist()
        logprobs = token_logprobs(raw, token_ids[logprob_rows], max(wanted), raw_rows)
        return SampledRows(token_ids, failed, logprob_rows, logprobs, wanted)

    def peek(self, logits: Tensor, slots: IntArray, positions: IntArray) -> IntArray:
        """The tokens, int64 [M], that `sample` would choose, of which nothing is counted; 0 in rows that fail. Slots may repeat.

        logits: float32 [M, V], of whatever model, may be overwritten.
        """
        return self._choose(logits, slots, positions)[0]

    def verify(
        self,
        logits: Tensor,
        slots: IntArray,
        positions: IntArray,
        drafts: Sequence[Sequence[int]],
        masks: TokenMasks | None = None,
    ) -> VerifiedTokens:
        """Sample behind the last known token and behind each draft of R requests, up to the first token that is not the draft at its
        place, and count what was sampled as output: the tokens that as many calls of `sample` would give.

        logits: float32 [M, V], may be overwritten, 1 + len(drafts[r]) rows of each request, request after request; slots: distinct slots
        [R]; positions [R]: index of each request's first sampled token in its sequence; masks: rows of `logits`.
        """
        requests, rows = self._requests, DraftRows(drafts)
        logprob_rows = np.flatnonzero(requests.num_top[slots[rows.request]] >= 0)
        raw, raw_places = logits, None
        if len(logprob_rows) and (masks is not None or requests.edited[slots].any()):
            raw, raw_places = _rows_of(logits, logprob_rows), logprob_rows
        if masks is not None:
            forbid(logits, masks)
        token_ids, failed = self._choose_in_waves(logits, slots, positions, rows)
        num_new, failed_requests = rows.outcome(token_ids, failed)
        tokens = rows.new_tokens(token_ids, num_new, failed_requests)
        wanted = np.where(failed_requests, -1, requests.num_top[slots])
        chosen = np.flatnonzero((rows.offset < num_new[rows.request]) & (wanted[rows.request] >= 0))
        if not len(chosen):
            return VerifiedTokens(tokens, failed_requests, {})
        num_top: list[int] = wanted[rows.request[chosen]].tolist()
        places = chosen if raw_places is None else np.searchsorted(raw_places, chosen)
        found = token_logprobs(raw, token_ids[chosen], max(num_top), places).to_structs(num_top)
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for request, entry in zip(rows.request[chosen].tolist(), found, strict=True):
            logprobs.setdefault(request, []).append(entry)
        return VerifiedTokens(tokens, failed_requests, logprobs)

    def _choose_in_waves(
        self, logits: Tensor, slots: IntArray, positions: IntArray, rows: DraftRows
    ) -> tuple[IntArray, BoolArray]:
        """Tokens and failures of all rows that can count. The first wave has the rows that depend on no draft being counted; wave i has
        row i of the requests with penalties whose drafts were all sampled so far."""
        requests = self._requests
        row_slots, row_positions = slots[rows.request], positions[rows.request] + rows.offset
        token_ids: IntArray = np.zeros(len(row_slots), dtype=np.int64)
        failed: BoolArray = np.zeros(len(row_slots), dtype=np.bool_)
        current = rows.start[requests.penalised[slots]]
        wave = np.flatnonzero(~requests.penalised[row_slots] | (rows.offset == 0))
        while len(wave):
            part = logits if len(wave) == len(row_slots) else _rows_of(logits, wave)
            token_ids[wave], failed[wave] = self._choose(part, row_slots[wave], row_positions[wave])
            current = current[~failed[current]]
            requests.count(row_slots[current], token_ids[current])
            wave = current = current[token_ids[current] == rows.draft_behind[current]] + 1
        return token_ids, failed

    def _choose(self, logits: Tensor, slots: IntArray, positions: IntArray) -> tuple[IntArray, BoolArray]:
        """A token for each row, and which rows have no distribution. Only reads what is known of the requests, so that slots may repeat."""
        if native_available() and can_read(logits):
            return sample_tokens(logits, self._requests.records, slots, positions)
        return torch_tokens(logits, self._requests, slots, positions)


def _rows_of(logits: Tensor, rows: IntArray) -> Tensor:
    """A copy of some rows."""
    return logits[torch.from_numpy(rows).to(logits.device)]
