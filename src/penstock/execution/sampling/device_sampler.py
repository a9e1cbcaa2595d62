"""Sampling where the logits are: tokens are chosen on the device and stay there; the host hears of them when it asks.

The same parameters, order of processing and random numbers as sampler.py, which is the definition; there is no wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams

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
    """Sampling state of up to `max_slots` requests on `device`, and the sampling of any subset of them."""

    def __init__(
        self, vocab_size: int, max_slots: int, device: torch.device, eos_token_ids: tuple[int, ...] = ()
    ) -> None:
        self.vocab_size = vocab_size
        raise NotImplementedError

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
        raise NotImplementedError

    def remove(self, slot: int) -> None:
        """Forget a request."""
        raise NotImplementedError

    def launch(self, logits: Tensor, slots: IntArray, device_slots: Tensor, positions: Tensor) -> DeviceSamples:
        """Give the device the work of sampling one token for each of `slots` and counting it as output.

        logits: float32 or 16-bit [M, V] on the device, may be overwritten; slots: distinct slots [M] on the host, `device_slots` the same
        on the device, int64; positions: int64 [M] on the device, index of the token being sampled in its sequence.
        """
        raise NotImplementedError
