"""What a request may not or should rather say: logit_bias, allowed_token_ids, min_tokens.

Token ids outside the vocabulary are ignored here; the edge refuses them before they come this far.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.sampling.slot_table import SlotTable


def valid_token_ids(token_ids: Iterable[int], vocab_size: int) -> list[int]:
    """The distinct ids inside the vocabulary, in ascending order."""
    return sorted({token_id for token_id in token_ids if 0 <= token_id < vocab_size})


class BiasState:
    """One row of numbers to add to the logits per request that has logit_bias or allowed_token_ids: vocab_size * 4 bytes each.

    A token outside allowed_token_ids gets minus infinity.
    """

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._rows = SlotTable(vocab_size, torch.float32, device, max_slots)

    def add(self, slot: int, params: SamplingParams) -> bool:
        """Take over the biases of a request; False when it has none."""
        if not params.logit_bias and params.allowed_token_ids is None:
            return False
        row = torch.zeros(self._vocab_size, dtype=torch.float32)
        if params.allowed_token_ids is not None:
            row.fill_(-torch.inf)
            row[valid_token_ids(params.allowed_token_ids, self._vocab_size)] = 0.0
        ids = valid_token_ids(params.logit_bias, self._vocab_size)
        row[ids] += torch.tensor([params.logit_bias[token_id] for token_id in ids], dtype=torch.float32)
        self._rows.acquire(slot).copy_(row)
        return True

    def remove(self, slot: int) -> None:
        self._rows.release(slot)

    def apply(self, logits: Tensor, slots: npt.NDArray[np.int64]) -> Tensor:
        """Biased logits [M, V] of `slots`, all of which were added."""
        return logits + self._rows.select(slots)


class MinTokensState:
    """Keeps requests from ending before their output has min_tokens tokens: masks eos and stop_token_ids until then.

    With ignore_eos the end-of-sequence tokens end nothing, so only stop_token_ids are masked.
    """

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._eos_token_ids = eos_token_ids
        # First position at which the request may end; 0 for slots without min_tokens.
        self.end_positions: npt.NDArray[np.int64] = np.zeros(max_slots, dtype=np.int64)
        # The masked ids of each slot, padded by repeating the first one.
        self._ids: npt.NDArray[np.int64] = np.zeros((max_slots, 1), dtype=np.int64)

    def add(self, slot: int, params: SamplingParams, num_prompt_tokens: int) -> bool:
        """Take over the bound of a request; False when nothing has to be masked."""
        stop_ids = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *self._eos_token_ids)
        ids = valid_token_ids(stop_ids, self._vocab_size)
        if not params.min_tokens or not ids:
            return False
        if len(ids) > self._ids.shape[1]:
            self._ids = np.pad(self._ids, ((0, 0), (0, len(ids) - self._ids.shape[1])), mode="edge")
        self._ids[slot] = ids + [ids[0]] * (self._ids.shape[1] - len(ids))
        self.end_positions[slot] = num_prompt_tokens + params.min_tokens
        return True

    def remove(self, slot: int) -> None:
        self.end_positions[slot] = 0

    def apply(self, logits: Tensor, slots: npt.NDArray[np.int64]) -> Tensor:
        """Masked logits [M, V] of `slots`, none of which may end at this position."""
        return logits.scatter(1, torch.from_numpy(self._ids[slots]).to(self._device), -torch.inf)
