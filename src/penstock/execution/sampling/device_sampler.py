"""Sampling where the logits are: tokens are chosen on the device and stay there; the host hears of them when it asks.

The same parameters, order of processing and random numbers as sampler.py, which is the definition; there is no wait for the device.
The kernels are in kernels/triton/sampling*.py and logprobs.py: a step of greedy rows launches two, one with random rows four, or six where
some have top_k or top_p, and log-probabilities take two more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.errors import ConfigError, IntegrityError
from penstock.core.types import SamplingParams
from penstock.execution.kernels.triton.logprobs import find_top_logprobs
from penstock.execution.kernels.triton.sampling import MAX_VOCAB_BITS, SamplingWorkspace, choose_largest
from penstock.execution.kernels.triton.sampling_draw import draw_tokens
from penstock.execution.kernels.triton.sampling_keys import pivot_distances
from penstock.execution.sampling.device_requests import DeviceRequests

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
    def launch(self, logits: Tensor, slots: IntArray, device_slots: Tensor, positions: Tensor) -> DeviceSamples:
        """Give the device the work of sampling one token for each of `slots` and counting it as output.

        logits: float32 or 16-bit [M, V] on the device, may be overwritten; slots: distinct slots [M] on the host, `device_slots` the same
        on the device, int64; positions: int64 [M] on the device, index of the token being sampled in its sequence. Rows whose slot is
        negative on the device (padding, which `slots` may leave out) fail and touch nothing.
        """
        if logits.shape[1] != self.vocab_size or len(device_slots) != len(logits) or len(positions) != len(logits):
            raise IntegrityError(
                f"{tuple(logits.shape)} logits for {len(device_slots)} slots and {len(positions)} positions"
            )
        requests, workspace = self._requests, self._workspace_for(len(logits))
        requests.flush()
        needs, tables = requests.needs(slots), requests.tables
        chosen_rows = np.flatnonzero(needs.num_top >= 0)
        device_rows = self._on_device(chosen_rows)
        raw, raw_rows = logits, device_rows
        edit = bool(needs.edited.any())
        if edit and logits.dtype is not torch.float32:
            logits = logits.float()
        elif needs.edited[chosen_rows].any():
            raw, raw_rows = logits[device_rows], torch.arange(len(chosen_rows), device=self._device)
        sampled = choose_largest(logits, device_slots, positions, tables, workspace, edit=edit, count=needs.counted)
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
                count=needs.counted,
            )
        logprobs = None
        if len(chosen_rows):
            wanted: list[int] = needs.num_top[chosen_rows].tolist()
            num_top = min(max(wanted), self.vocab_size)
            found = find_top_logprobs(raw, raw_rows, device_rows, sampled.token_ids, num_top)
            logprobs = DeviceLogprobs(chosen_rows, wanted, *found)
        return DeviceSamples(sampled.token_ids, sampled.failed.view(torch.bool), logprobs)

    def _workspace_for(self, rows: int) -> SamplingWorkspace:
        if rows > self._workspace.rows:
            self._workspace = SamplingWorkspace(1 << (rows - 1).bit_length(), self.vocab_size, self._device)
        return self._workspace

    def _on_device(self, rows: IntArray) -> Tensor:
        """Rows with log-probabilities, which are mostly the same from step to step and then not sent again."""
        known, on_device = self._sent_rows
        if not np.array_equal(known, rows):
            on_device = torch.from_numpy(rows)
            if self._device.type == "cuda":
                on_device = on_device.pin_memory().to(self._device, non_blocking=True)
            self._sent_rows = rows, on_device
        return on_device
