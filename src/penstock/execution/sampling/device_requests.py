"""What sampling on a device remembers of each request: parameters and states of tokens, brought up to date by difference.

`add` and `remove` change what the host knows; `flush` sends all changes since the last one in one pinned, asynchronous copy. Work given
to the device before is not disturbed, because everything happens in the order of one stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.kernels.triton.sampling import (
    BLOCK,
    MAX_STATE_COUNT,
    PARAMETER_WORDS,
    SAMPLING_PARAMETERS,
    STATE_COUNT_SHIFT,
    STATE_FORBIDDEN,
    STATE_USED,
    SamplingTables,
)
from penstock.execution.kernels.triton.sampling_keys import end_key
from penstock.execution.sampling.device_waves import send
from penstock.execution.sampling.masks import biases, forbidden_before_end
from penstock.execution.sampling.penalties import count_tokens, uses_penalties
from penstock.execution.sampling.random import stream_keys

IntArray = npt.NDArray[np.int64]

_NO_ENTRIES: IntArray = np.zeros((0, 2), dtype=np.int64)


class DenseRows:
    """Rows as long as the vocabulary, [rows, stride] on the device, given out to slots that need one; grows by doubling.

    A row that is given out is filled with a value and then gets entries: pairs of token id and value.
    """

    def __init__(self, stride: int, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(1, stride, dtype=dtype, device=device)
        self._max_rows = max_rows
        self._free = [0]
        self._row_of_slot: dict[int, int] = {}
        self._pending: dict[int, tuple[float, IntArray]] = {}

    def take(self, slot: int, fill: float, ids: npt.ArrayLike, values: npt.ArrayLike) -> int:
        """A row for `slot`; its content is on the device after the next flush."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._row_of_slot[slot] = row
        self._pending[row] = (fill, np.column_stack([np.asarray(ids, dtype=np.int64), self._bits(values)]))
        return row

    def give_back(self, slot: int) -> None:
        """Take the row of `slot` back, if it has one."""
        row = self._row_of_slot.pop(slot, None)
        if row is not None:
            self._free.append(row)
            self._pending.pop(row, None)

    def take_pending(self) -> tuple[dict[float, list[int]], IntArray]:
        """What the next flush has to send: rows by the value that fills them, and entries [N, 2] (place in all rows, value's bits)."""
        fills: dict[float, list[int]] = {}
        entries = []
        for row, (fill, content) in self._pending.items():
            fills.setdefault(fill, []).append(row)
            entries.append(content + np.array([row * self.rows.shape[1], 0]))
        self._pending.clear()
        return fills, np.concatenate(entries) if entries else _NO_ENTRIES

    def write(self, places: Tensor, bits: Tensor) -> None:
        """Store entries, both int64 [N] on the device."""
        values = bits.to(torch.int32).view(torch.float32) if self.rows.is_floating_point() else bits.to(self.rows.dtype)
        self.rows.view(-1)[places] = values

    def _bits(self, values: npt.ArrayLike) -> IntArray:
        if self.rows.is_floating_point():
            return np.asarray(values, dtype=np.float32).view(np.int32).astype(np.int64)
        return np.asarray(values, dtype=np.int64)

    def _grow(self) -> None:
        old = len(self.rows)
        rows = self.rows.new_zeros(min(max(2 * old, 8), self._max_rows), self.rows.shape[1])
        rows[:old] = self.rows
        self.rows = rows
        self._free.extend(range(len(rows) - 1, old - 1, -1))


@dataclass(frozen=True)
class Needs:
    """What M slots ask for, and so which kernels a step needs. random, filtered, counted: whether any has a temperature, top_k or top_p,
    penalties. edited: bool [M], may have logits changed before a token is chosen; num_top: int64 [M], -1: no log-probabilities."""

    random: bool
    filtered: bool
    counted: bool
    edited: npt.NDArray[np.bool_]
    num_top: IntArray


class DeviceRequests:
    """Up to `max_slots` requests on `device`; see sampling/requests.py for what they are."""

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device
        stride = -(-vocab_size // BLOCK) * BLOCK
        self._states = DenseRows(stride, max_slots, torch.int16, device)
        self._biases = DenseRows(stride, max_slots, torch.float32, device)
        self._records: npt.NDArray[np.void] = np.zeros(max_slots, dtype=SAMPLING_PARAMETERS)
        self._records["state_row"] = self._records["bias_row"] = -1
        self._parameters = torch.zeros(max_slots, PARAMETER_WORDS, dtype=torch.int64, device=device)
        self._changed: set[int] = set()
        self._random: npt.NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)
        self._filtered, self._edited, self._counted = (self._random.copy() for _ in range(3))
        self._num_top: IntArray = np.full(max_slots, -1, dtype=np.int64)

    @property
    def tables(self) -> SamplingTables:
        return SamplingTables(self._parameters, self._states.rows, self._biases.rows)

    def needs(self, slots: IntArray) -> Needs:
        return Needs(
            random=bool(self._random[slots].any()),
            filtered=bool(self._filtered[slots].any()),
            counted=bool(self._counted[slots].any()),
            edited=self._edited[slots],
            num_top=self._num_top[slots],
        )

    def counted(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Which of them have penalties, so that what they sample depends on the tokens before."""
        return self._counted[slots]

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
        record = self._records[slot]
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        temperature = np.float32(params.temperature)
        if temperature > 0:
            temperature = np.float32(1.0) / max(temperature, np.finfo(np.float32).tiny)
        record["inverse_temperature"] = temperature
        record["top_k"], record["top_p"], record["end_key"] = top_k, params.top_p, end_key(params.min_p)
        record["key"] = stream_keys(torch.tensor([seed]), torch.tensor([sample_index])).item()
        record["presence"] = np.float32(params.presence_penalty)
        record["frequency"] = np.float32(params.frequency_penalty)
        record["repetition"] = np.float32(params.repetition_penalty)
        stops = forbidden_before_end(params, self._eos_token_ids, self._vocab_size)
        record["end_position"] = len(prompt) + params.min_tokens if stops else 0
        self._counted[slot] = uses_penalties(params)
        record["state_row"] = self._take_states(slot, stops, prompt, output)
        record["bias_row"] = self._take_biases(slot, params)
        self._random[slot] = temperature > 0
        self._filtered[slot] = self._random[slot] and (top_k < self._vocab_size or params.top_p < 1.0)
        self._edited[slot] = record["state_row"] >= 0 or record["bias_row"] >= 0
        self._num_top[slot] = -1 if params.logprobs is None else params.logprobs
        self._changed.add(slot)

    def remove(self, slot: int) -> None:
        """Forget a request; the device is not told, since nobody samples the slot until it is added again."""
        if self._edited[slot]:
            self._states.give_back(slot)
            self._biases.give_back(slot)
        self._changed.discard(slot)

    def flush(self) -> None:
        """Send what has changed; does not wait."""
        if not self._changed:
            return
        slots = np.array(sorted(self._changed), dtype=np.int64)
        self._changed.clear()
        records = self._records[slots].view(np.int64).reshape(len(slots), PARAMETER_WORDS)
        pools = [(pool, *pool.take_pending()) for pool in (self._states, self._biases)]
        parts = [slots, records.reshape(-1)]
        for _, fills, entries in pools:
            parts += [np.array(rows, dtype=np.int64) for rows in fills.values()]
            parts += [entries[:, 0], entries[:, 1]]
        sent = iter(send(parts, self._device))
        self._parameters.index_copy_(0, next(sent), next(sent).view(len(slots), PARAMETER_WORDS))
        for pool, fills, entries in pools:
            for fill in fills:
                pool.rows.index_fill_(0, next(sent), fill)
            places, bits = next(sent), next(sent)
            if len(entries):
                pool.write(places, bits)

    def _take_states(
        self, slot: int, stops: list[int], prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]
    ) -> int:
        """A row of token states for a request with penalties or with stops to forbid; -1 without."""
        if not (self._counted[slot] or stops):
            return -1
        ids, states = np.array(stops, dtype=np.int64), np.full(len(stops), STATE_FORBIDDEN, dtype=np.int64)
        if self._counted[slot]:
            used, counts = count_tokens(prompt, output, self._vocab_size)
            times = np.minimum(counts, MAX_STATE_COUNT).astype(np.int64)
            used_states = (times << STATE_COUNT_SHIFT) | STATE_USED
            ids, places = np.unique(np.concatenate([ids, used]), return_inverse=True)
            merged = np.zeros(len(ids), dtype=np.int64)
            np.add.at(merged, places, np.concatenate([states, used_states]))
            states = merged
        return self._states.take(slot, 0, ids, states)

    def _take_biases(self, slot: int, params: SamplingParams) -> int:
        """A row of biases for a request with logit_bias or allowed_token_ids; -1 without."""
        if not params.logit_bias and params.allowed_token_ids is None:
            return -1
        biased = biases(params, self._vocab_size)
        fill = 0.0 if params.allowed_token_ids is None else -np.inf
        return self._biases.take(slot, fill, list(biased), list(biased.values()))
