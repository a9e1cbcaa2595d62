"""Penalties on tokens that were already used.

    repetition   logit / r where it is positive, logit * r where it is negative, for tokens of prompt and output
                 (Keskar et al., "CTRL", 2019; as in transformers and vLLM)
    frequency    logit - f * (times the token is in the output)
    presence     logit - p if the token is in the output   (both as in OpenAI's API)

in this order. The counts are kept per request and follow the output token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.sampling.slot_table import SlotTable


def uses_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def apply_penalties(
    logits: Tensor, output_counts: Tensor, in_prompt: Tensor, *, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> Tensor:
    """Penalised logits [M, V].

    logits, output_counts: float32 [M, V]; in_prompt: bool [M, V]; presence, frequency, repetition: float32 [M].
    """
    in_output = output_counts.clamp(max=1.0)
    factor = 1.0 + torch.maximum(in_output, in_prompt) * (repetition - 1.0).unsqueeze(1)
    # One of the two summands is zero; this reads like a torch.where but is several times faster on a CPU.
    logits = logits.clamp(min=0.0).div_(factor).add_(logits.clamp(max=0.0).mul_(factor))
    logits.addcmul_(output_counts, frequency.unsqueeze(1), value=-1.0)
    return logits.addcmul_(in_output, presence.unsqueeze(1), value=-1.0)


class PenaltyState:
    """Token counts of the requests that have penalties: vocab_size * 5 bytes each, nothing for the others."""

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        # Floats, exact up to 2**24, because they are only multiplied.
        self._counts = SlotTable(vocab_size, torch.float32, device, max_slots)
        self._in_prompt = SlotTable(vocab_size, torch.bool, device, max_slots)
        # Presence, frequency and repetition penalty of each slot.
        self._weights: npt.NDArray[np.float32] = np.zeros((max_slots, 3), dtype=np.float32)

    def add(
        self, slot: int, params: SamplingParams, prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]
    ) -> None:
        """Start counting for `slot`. Token ids outside the vocabulary are not counted."""
        self._weights[slot] = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        counts = self._counts.acquire(slot)
        in_prompt = self._in_prompt.acquire(slot)
        ids = self._valid_ids(output)
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
        in_prompt[self._valid_ids(prompt)] = True

    def remove(self, slot: int) -> None:
        self._counts.release(slot)
        self._in_prompt.release(slot)

    def apply(self, logits: Tensor, slots: npt.NDArray[np.int64]) -> Tensor:
        """Penalised logits [M, V] of `slots`, all of which were added."""
        presence, frequency, repetition = torch.from_numpy(self._weights[slots].T.copy()).to(self._device)
        return apply_penalties(
            logits,
            self._counts.select(slots),
            self._in_prompt.select(slots),
            presence=presence,
            frequency=frequency,
            repetition=repetition,
        )

    def count(self, slots: npt.NDArray[np.int64], token_ids: Tensor) -> None:
        """Count one new output token, int64 [M], for each of `slots`, all of which were added."""
        rows = torch.from_numpy(self._counts.rows[slots]).to(self._device)
        self._counts.data[rows, token_ids] += 1

    def _valid_ids(self, token_ids: npt.NDArray[np.int32] | Sequence[int]) -> Tensor:
        ids = np.asarray(token_ids, dtype=np.int64)
        return torch.from_numpy(ids[(ids >= 0) & (ids < self._vocab_size)]).to(self._device)
