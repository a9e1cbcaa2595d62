"""The persistent batch: what the runner remembers of each request, and how a step's diff becomes tensors.

A request lives in a slot from its NewRequest until it is finished or preempted. Everything is kept in host arrays with one row
per slot, so that a step is built with a few vectorised gathers, whatever the number of requests:

    token_ids     [ prompt | output …                | unused ]       row of a slot
                  0        num_prompt     num_tokens
    block_table   [ 7 | 3 | 12 | unused ]                             token t is in block_table[t // block_size]

Sampled tokens are appended here, by the runner: a step may start from a token that the scheduler has not seen yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.core.types import SamplingParams
from penstock.engine.step import CachedRequest, NewRequest, RequestKey
from penstock.execution.attention.context import AttentionMetadata

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepInputs:
    """A step as tensors. R requests in the order of the schedule, T tokens.

    keys, slots [R]; counts [R]: tokens scheduled; starts [R]: first position computed.
    input_ids, positions: int64 [T] on the device. attention: see AttentionMetadata.
    sampling: indices into the R requests whose tokens are all computed after this step; logit_rows: int64, the last token of each of
    them, an index into the T tokens; sample_positions: position of the token that each of them samples.
    """

    keys: list[RequestKey]
    slots: IntArray
    counts: IntArray
    starts: IntArray
    input_ids: Tensor
    positions: Tensor
    attention: AttentionMetadata
    sampling: IntArray
    logit_rows: Tensor
    sample_positions: IntArray


@dataclass(frozen=True)
class RequestState:
    """What has no place in an array."""

    slot: int
    num_prompt_tokens: int
    sampling: SamplingParams
    prompt_logprobs_start: int


class PersistentBatch:
    """Up to `max_slots` requests of up to `max_model_len` tokens. Memory is touched only as far as requests reach."""

    def __init__(self, max_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._requests: dict[RequestKey, RequestState] = {}
        # Requests of the last step and their slots: while a batch only decodes, the next step has the same ones.
        self._last_keys: list[RequestKey] = []
        self._last_slots: IntArray = np.zeros(0, dtype=np.int64)
        self._broken: set[RequestKey] = set()
        # One more than the context: the token sampled from a full one is stored, though never computed, and may have a block.
        self._token_ids: npt.NDArray[np.int32] = np.zeros((max_slots, max_model_len + 1), dtype=np.int32)
        self._block_table: npt.NDArray[np.int32] = np.zeros(
            (max_slots, max_model_len // block_size + 1), dtype=np.int32
        )
        self._num_tokens: IntArray = np.zeros(max_slots, dtype=np.int64)
        self._num_computed: IntArray = np.zeros(max_slots, dtype=np.int64)
        self._num_blocks: IntArray = np.zeros(max_slots, dtype=np.int64)
        # Which slots hold requests that want log-probabilities of their prompt.
        self.wants_prompt_logprobs: npt.NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._requests

    def request(self, key: RequestKey) -> RequestState:
        return self._requests[key]

    def token_ids(self, slot: int) -> npt.NDArray[np.int32]:
        """Prompt and output so far of `slot`; a view."""
        return self._token_ids[slot, : self._num_tokens[slot]]

    def remove(self, key: RequestKey) -> int | None:
        """Forget a request and return its slot, or None when it is not known."""
        self._broken.discard(key)
        request = self._requests.pop(key, None)
        if request is None:
            return None
        self._free_slots.append(request.slot)
        self._last_keys = []
        return request.slot

    def add(self, new: NewRequest) -> int:
        """Take over a request that is not known and return its slot. Raises IntegrityError when it does not fit."""
        self._broken.discard(new.key)
        if new.key in self._requests:
            raise IntegrityError(f"request {new.key} is new but known")
        if not self._free_slots:
            raise IntegrityError(f"request {new.key} is new but all {len(self._requests)} slots are taken")
        if len(new.token_ids) >= self._token_ids.shape[1] or len(new.block_ids) > self._block_table.shape[1]:
            raise IntegrityError(f"request {new.key} has {len(new.token_ids)} tokens in {len(new.block_ids)} blocks")
        slot = self._free_slots.pop()
        self._requests[new.key] = RequestState(slot, new.num_prompt_tokens, new.sampling, new.prompt_logprobs_start)
        self._token_ids[slot, : len(new.token_ids)] = new.token_ids
        self._num_tokens[slot] = len(new.token_ids)
        self._num_computed[slot] = new.num_computed_tokens
        self._block_table[slot, : len(new.block_ids)] = new.block_ids
        self._num_blocks[slot] = len(new.block_ids)
        self.wants_prompt_logprobs[slot] = new.sampling.prompt_logprobs is not None
        return slot

    def update(self, cached: Sequence[CachedRequest]) -> None:
        """Apply what changed for known requests. Raises IntegrityError for an unknown one."""
        for change in cached:
            request = self._requests.get(change.key)
            if change.key in self._broken:
                continue
            if request is None:
                raise IntegrityError(f"request {change.key} is scheduled but not known")
            slot = request.slot
            self._num_computed[slot] = change.num_computed_tokens
            if change.new_block_ids:
                first = int(self._num_blocks[slot])
                end = first + len(change.new_block_ids)
                if end > self._block_table.shape[1]:
                    raise IntegrityError(f"request {change.key} has {end} blocks")
                self._block_table[slot, first:end] = change.new_block_ids
                self._num_blocks[slot] = end

    def set_broken(self, keys: Iterable[RequestKey]) -> None:
        """Leave these requests, known or not, out of every step until they are removed or come again: their KV cache or tokens are
        not what the scheduler believes, because a step failed."""
        self._broken.update(keys)

    def build(self, num_scheduled_tokens: dict[RequestKey, int]) -> StepInputs | None:
        """The tensors of a step; None when nothing is left to run. Raises IntegrityError for what cannot be run."""
        if self._broken:
            num_scheduled_tokens = {key: n for key, n in num_scheduled_tokens.items() if key not in self._broken}
        if not num_scheduled_tokens:
            return None
        keys = list(num_scheduled_tokens)
        slots = self._slots_of(keys)
        counts: IntArray = np.array(list(num_scheduled_tokens.values()), dtype=np.int64)
        starts = self._num_computed[slots]
        ends = starts + counts
        self._check(keys, slots, ends)

        # Token t of the step belongs to request owner[t].
        query_start = np.zeros(len(keys) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        num_tokens = int(query_start[-1])
        if num_tokens == len(keys):
            token_slots, positions = slots, starts
        else:
            owner = np.repeat(np.arange(len(keys)), counts)
            positions = np.arange(num_tokens) + (starts - query_start[:-1])[owner]
            token_slots = slots[owner]
        block, offset = np.divmod(positions, self._block_size)
        slot_mapping = self._block_table[token_slots, block].astype(np.int64) * self._block_size + offset
        input_ids = self._token_ids[token_slots, positions].astype(np.int64)

        max_seq_len = int(ends.max())
        width = -(-max_seq_len // self._block_size)
        sampling = np.flatnonzero(ends == self._num_tokens[slots])
        multiple = np.flatnonzero(counts != 1)
        query_start_host, seq_lens_host = query_start.astype(np.int32), ends.astype(np.int32)
        attention = AttentionMetadata(
            query_start=self._tensor(query_start_host),
            seq_lens=self._tensor(seq_lens_host),
            block_tables=self._tensor(self._block_table[slots, :width]),
            slot_mapping=self._tensor(slot_mapping),
            num_decodes=int(multiple[0]) if len(multiple) else len(keys),
            query_start_host=query_start_host,
            seq_lens_host=seq_lens_host,
            max_seq_len=max_seq_len,
        )
        return StepInputs(
            keys=keys,
            slots=slots,
            counts=counts,
            starts=starts,
            input_ids=self._tensor(input_ids),
            positions=self._tensor(positions),
            attention=attention,
            sampling=sampling,
            logit_rows=self._tensor(query_start[1:][sampling] - 1),
            sample_positions=ends[sampling],
        )

    def finish_step(self, inputs: StepInputs) -> None:
        """The tokens of a step are computed."""
        self._num_computed[inputs.slots] += inputs.counts

    def append(self, slots: IntArray, token_ids: IntArray) -> None:
        """Append one sampled token to each of `slots`."""
        self._token_ids[slots, self._num_tokens[slots]] = token_ids
        self._num_tokens[slots] += 1

    def _slots_of(self, keys: list[RequestKey]) -> IntArray:
        """int64 [R]; not to be changed."""
        if keys != self._last_keys:
            self._last_slots = np.array([self._requests[key].slot for key in keys], dtype=np.int64)
            self._last_keys = keys
        return self._last_slots

    def _check(self, keys: list[RequestKey], slots: IntArray, ends: IntArray) -> None:
        too_far = (ends > self._num_tokens[slots]) | (ends > self._num_blocks[slots] * self._block_size)
        if too_far.any():
            first = int(np.flatnonzero(too_far)[0])
            slot = slots[first]
            raise IntegrityError(
                f"request {keys[first]} is scheduled up to token {ends[first]} but has {self._num_tokens[slot]} tokens "
                f"and {self._num_blocks[slot]} blocks of {self._block_size}"
            )

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)
