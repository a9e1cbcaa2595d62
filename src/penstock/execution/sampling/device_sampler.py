"""Sampling where the logits are: tokens are chosen on the device and stay there; the host hears of them when it asks.

The same parameters, order of processing and random numbers as sampler.py, which is the definition; there is no wait for the device.
The kernels are in kernels/triton/sampling*.py and logprobs.py: a step of greedy rows launches two, one with random rows four, or six where
some have top_k or top_p, and log-probabilities take two more.

Drafts are verified by sampling behind each of them as if it were a token of the request, which needs nothing but its position: all rows
of a step at once. Only what penalties count depends on the drafts before, so rows of requests with penalties are sampled in waves, and a
row behind a draft that was refused is left out of its wave by the device itself:

    request   drafts     first pass             wave 1              wave 2
    a         3          a0 a1 a2 a3
    b         2, counts  b0                     b1 if b0 = draft 1  b2 if b1 = draft 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.errors import ConfigError, IntegrityError
from penstock.core.types import SamplingParams
from penstock.execution.kernels.triton.logprobs import find_top_logprobs
from penstock.execution.kernels.triton.sampling import (
    MAX_VOCAB_BITS,
    SampledTokens,
    SamplingWorkspace,
    choose_largest,
)
from penstock.execution.kernels.triton.sampling_draw import draw_tokens
from penstock.execution.kernels.triton.sampling_keys import pivot_distances
from penstock.execution.kernels.triton.token_masks import forbid_tokens
from penstock.execution.sampling.device_requests import DeviceRequests, Needs
from penstock.execution.sampling.device_waves import Waves, on_device, plan_waves, send
from penstock.execution.sampling.masks import TokenMasks

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DeviceLogprobs:
    """Log-probabilities of L tokens, on the device. rows: which of the M sampled rows they belong to (host); num_top: alternatives wanted
    for each (host). logprobs: float32 [L]; ranks: int32 [L]; top_ids: int32 [L, K]; top_logprobs: float32 [L, K], as in LogprobRows."""

    rows: IntArray
    num_top: list[int]
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class DeviceSamples:
    """One step's tokens, on the device. token_ids: int64 [M], 0 in failed rows; failed: bool [M]; see SampledRows."""

    token_ids: Tensor
    failed: Tensor
    logprobs: DeviceLogprobs | None


class DeviceSampler:
    """Sampling state of up to `max_slots` requests on `device`, and the sampling of any subset of them.

    All calls belong to one stream of the device. Raises ConfigError for a vocabulary of more than 2 ** 20 tokens.
    """

    def __init__(
        self, vocab_size: int, max_slots: int, device: torch.device, eos_token_ids: tuple[int, ...] = ()
    ) -> None:
        if vocab_size > 2**MAX_VOCAB_BITS:
            raise ConfigError(f"A vocabulary of {vocab_size} tokens is too large to sample on a GPU; use --device cpu.")
        self.vocab_size = vocab_size
        self._device = device
        self._requests = DeviceRequests(vocab_size, max_slots, device, eos_token_ids)
        self._pivots = pivot_distances(device)
        self._workspace = SamplingWorkspace(0, vocab_size, device)
        self._sent_rows: tuple[IntArray, Tensor] = (
            np.zeros(0, dtype=np.int64),
            torch.zeros(0, dtype=torch.int64, device=device),
        )

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

    @torch.inference_mode()
    def launch(
        self,
        logits: Tensor,
        slots: IntArray,
        device_slots: Tensor,
        positions: Tensor,
        masks: TokenMasks | None = None,
    ) -> DeviceSamples:
        """Give the device the work of sampling one token for each of `slots` and counting it as output.

        logits: float32 or 16-bit [M, V] on the device, may be overwritten; slots: distinct slots [M] on the host, `device_slots` the same
        on the device, int64; positions: int64 [M] on the device, index of the token being sampled in its sequence. Rows whose slot is
        negative on the device (padding, which `slots` may leave out) fail and touch nothing.
        """
        return self._launch(logits, slots, device_slots, positions, None, masks)

    @torch.inference_mode()
    def launch_verify(
        self,
        logits: Tensor,
        slots: IntArray,
        device_slots: Tensor,
        positions: Tensor,
        drafts: Sequence[Sequence[int]],
        masks: TokenMasks | None = None,
    ) -> DeviceSamples:
        """Give the device the work of sampling behind the last token and behind every draft of each of `slots`, and of counting what
        becomes output: up to the first sample that is not the draft at its place.

        slots: distinct slots [R] on the host, with `drafts` [R]. logits [M, V], device_slots and positions [M] as for `launch`, with rows
        as DraftRows has them. What the rows behind that first sample say is nobody's token; those of requests with penalties have failed.
        """
        counts = np.array([1 + len(some) for some in drafts], dtype=np.int64)
        if counts.sum() != len(logits) or len(slots) != len(counts):
            raise IntegrityError(
                f"{len(logits)} rows of logits for {counts.sum()} of {len(slots)} requests with drafts"
            )
        waves = plan_waves(drafts, self._requests.counted(slots), self._device)
        return self._launch(logits, np.repeat(slots, counts), device_slots, positions, waves, masks)

    @torch.inference_mode()
    def peek(self, logits: Tensor, slots: IntArray, positions: IntArray) -> IntArray:
        """The tokens that sampling would choose, int64 [M]: nothing is counted or remembered. Waits for the device.

        logits: as for `launch`; slots [M], which may repeat, and positions [M], on the host. Rows without a distribution give 0.
        """
        self._requests.flush()
        needs = self._requests.needs(slots)
        if needs.edited.any():
            logits = logits.float()
        device_slots, device_positions = send([slots, positions], self._device)
        sampled = self._choose(logits, device_slots, device_positions, needs, count=False)
        return sampled.token_ids.cpu().numpy()

    def _launch(
        self,
        logits: Tensor,
        slots: IntArray,
        device_slots: Tensor,
        positions: Tensor,
        waves: Waves | None,
        masks: TokenMasks | None,
    ) -> DeviceSamples:
        """See `launch`; slots [M] may repeat."""
        if logits.shape[1] != self.vocab_size or len(device_slots) != len(logits) or len(positions) != len(logits):
            raise IntegrityError(
                f"{tuple(logits.shape)} logits for {len(device_slots)} slots and {len(positions)} positions"
            )
        requests = self._requests
        requests.flush()
        needs = requests.needs(slots)
        chosen_rows = np.flatnonzero(needs.num_top >= 0)
        device_rows = self._on_device(chosen_rows)
        raw, raw_rows = logits, device_rows
        if needs.edited.any() and logits.dtype is not torch.float32:
            logits = logits.float()
        elif len(chosen_rows) and (masks is not None or needs.edited[chosen_rows].any()):
            raw, raw_rows = logits[device_rows], torch.arange(len(chosen_rows), device=self._device)
        if masks is not None:
            self._forbid(logits, masks)
        if waves is None:
            sampled = self._choose(logits, device_slots, positions, needs, count=needs.counted)
        else:
            sampled = self._choose_in_waves(logits, device_slots, positions, needs, waves)
        logprobs = None
        if len(chosen_rows):
            wanted: list[int] = needs.num_top[chosen_rows].tolist()
            num_top = min(max(wanted), self.vocab_size)
            found = find_top_logprobs(raw, raw_rows, device_rows, sampled.token_ids, num_top)
            logprobs = DeviceLogprobs(chosen_rows, wanted, *found)
        return DeviceSamples(sampled.token_ids, sampled.failed.view(torch.bool), logprobs)

    def _choose(
        self, logits: Tensor, device_slots: Tensor, positions: Tensor, needs: Needs, *, count: bool
    ) -> SampledTokens:
        """A token for every row; logits are float32 where any row is edited."""
        tables, workspace = self._requests.tables, self._workspace_for(len(logits))
        edit = bool(needs.edited.any())
        sampled = choose_largest(logits, device_slots, positions, tables, workspace, edit=edit, count=count)
        if needs.random:
            draw_tokens(
                logits,
                device_slots,
                positions,
                self._pivots,
                tables,
                workspace,
                sampled,
                filtered=needs.filtered,
                count=count,
            )
        return sampled

    def _choose_in_waves(
        self, logits: Tensor, device_slots: Tensor, positions: Tensor, needs: Needs, waves: Waves
    ) -> SampledTokens:
        first_slots = device_slots.index_fill(0, waves.later_rows, -1)
        sampled = self._choose(logits, first_slots, positions, needs, count=needs.counted)
        for wave in waves.waves:
            before = wave.rows - 1
            goes_on = (sampled.token_ids[before] == wave.drafts) & (sampled.failed[before] == 0)
            slots = device_slots[wave.rows].masked_fill(~goes_on, -1)
            found = self._choose(logits[wave.rows], slots, positions[wave.rows], needs, count=True)
            sampled.token_ids[wave.rows] = found.token_ids
            sampled.failed[wave.rows] = found.failed
        return sampled

    def _forbid(self, logits: Tensor, masks: TokenMasks) -> None:
        if masks.bits.shape != (len(masks.rows), (self.vocab_size + 7) // 8):
            raise IntegrityError(
                f"masks of {masks.bits.shape} bytes for {len(masks.rows)} rows of {self.vocab_size} tokens"
            )
        (rows,) = send([masks.rows], self._device)
        forbid_tokens(logits, rows, on_device(torch.from_numpy(masks.bits.copy()), self._device))

    def _workspace_for(self, rows: int) -> SamplingWorkspace:
        if rows > self._workspace.rows:
            self._workspace = SamplingWorkspace(1 << (rows - 1).bit_length(), self.vocab_size, self._device)
        return self._workspace

    def _on_device(self, rows: IntArray) -> Tensor:
        """Rows with log-probabilities, which are mostly the same from step to step and then not sent again."""
        known, on_device = self._sent_rows
        if not np.array_equal(known, rows):
            (on_device,) = send([rows], self._device)
            self._sent_rows = rows, on_device
        return on_device
