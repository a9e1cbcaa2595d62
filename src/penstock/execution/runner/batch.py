"""The persistent batch: what the runner remembers of each request, and how a step's diff becomes tensors.

A request lives in a slot from its NewRequest until it is finished or preempted. Everything is kept in host arrays with one row
per slot, so that a step is built with a few vectorised gathers, whatever the number of requests:

    token_ids     [ prompt | output …                | unused ]       row of a slot
                  0        num_prompt     num_tokens
    block_table   [ 7 | 3 | 12 | unused ]                             token t is in block_table[t // block_size]

Sampled tokens are appended here, by the runner: a step may start from a token that the scheduler has not seen yet. Where tokens stay
on a device, `advance` counts them when they are launched, and `fill` writes them down when they are known.
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
class StepShape:
    """A step in numbers of the host. R requests in the order of the schedule, T tokens.

    keys, slots [R]; counts [R]: tokens scheduled; starts [R]: first position computed; ends [R]: behind the last position computed;
    query_start [R + 1]: first token of each request in the step, then T; num_decodes: so many requests at the beginning have one token.
    sampling: indices into the R requests whose tokens are all computed after this step; sample_positions: position of the token that
    each of them samples.
    """

    keys: list[RequestKey]
    slots: IntArray
    counts: IntArray
    starts: IntArray
    ends: IntArray
    query_start: IntArray
    num_decodes: int
    max_seq_len: int
    sampling: IntArray
    sample_positions: IntArray

    @property
    def num_tokens(self) -> int:
        return int(self.query_start[-1])


@dataclass(frozen=True)
class StepInputs(StepShape):
    """A step as tensors: input_ids, positions: int64 [T] on the device; attention: see AttentionMetadata; logit_rows: int64, the last token
    of each request that samples, an index into the T tokens."""

    input_ids: Tensor
    positions: Tensor
    attention: AttentionMetadata
    logit_rows: Tensor


@dataclass(frozen=True)
class NewBlocks:
    """Columns [first, end) of a slot's block table that were appended."""

    slot: int
    first: int
    end: int


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
        self._num_added = 0
        # Which request is in a slot: a number that no other request ever has; 0 in a free slot.
        self.incarnations: IntArray = np.zeros(max_slots, dtype=np.int64)
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

    def block_ids(self, slot: int) -> npt.NDArray[np.int32]:
        """Blocks of `slot`; a view."""
        return self._block_table[slot, : self._num_blocks[slot]]

    def remove(self, key: RequestKey) -> int | None:
        """Forget a request and return its slot, or None when it is not known."""
        self._broken.discard(key)
        request = self._requests.pop(key, None)
        if request is None:
            return None
        self._free_slots.append(request.slot)
        self.incarnations[request.slot] = 0
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
        self._num_added += 1
        self.incarnations[slot] = self._num_added
        self._requests[new.key] = RequestState(slot, new.num_prompt_tokens, new.sampling, new.prompt_logprobs_start)
        self._token_ids[slot, : len(new.token_ids)] = new.token_ids
        self._num_tokens[slot] = len(new.token_ids)
        self._num_computed[slot] = new.num_computed_tokens
        self._block_table[slot, : len(new.block_ids)] = new.block_ids
        self._num_blocks[slot] = len(new.block_ids)
        self.wants_prompt_logprobs[slot] = new.sampling.prompt_logprobs is not None
        return slot

    def update(self, cached: Sequence[CachedRequest]) -> list[NewBlocks]:
        """Apply what changed for known requests, and return the blocks that were appended. Raises IntegrityError for an unknown request."""
        if self._broken:
            cached = [change for change in cached if change.key not in self._broken]
        if not cached:
            return []
        slots = self._slots_of([change.key for change in cached])
        self._num_computed[slots] = [change.num_computed_tokens for change in cached]
        return [
            self._append_blocks(change, slot)
            for change, slot in zip(cached, slots.tolist(), strict=True)
            if change.new_block_ids
        ]

    def _append_blocks(self, change: CachedRequest, slot: int) -> NewBlocks:
        first = int(self._num_blocks[slot])
        end = first + len(change.new_block_ids)
        if end > self._block_table.shape[1]:
            raise IntegrityError(f"request {change.key} has {end} blocks")
        self._block_table[slot, first:end] = change.new_block_ids
        self._num_blocks[slot] = end
        return NewBlocks(slot, first, end)

    def set_broken(self, keys: Iterable[RequestKey]) -> None:
        """Leave these requests, known or not, out of every step until they are removed or come again: their KV cache or tokens are
        not what the scheduler believes, because a step failed."""
        self._broken.update(keys)

    def shape(self, num_scheduled_tokens: dict[RequestKey, int]) -> StepShape | None:
        """The step without those that are broken; None when nothing is left to run. Raises IntegrityError for what cannot be run."""
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
        query_start: IntArray = np.zeros(len(keys) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        multiple = np.flatnonzero(counts != 1)
        sampling = np.flatnonzero(ends == self._num_tokens[slots])
        return StepShape(
            keys=keys,
            slots=slots,
            counts=counts,
            starts=starts,
            ends=ends,
            query_start=query_start,
            num_decodes=int(multiple[0]) if len(multiple) else len(keys),
            max_seq_len=int(ends.max()),
            sampling=sampling,
            sample_positions=ends[sampling],
        )

    def build(self, num_scheduled_tokens: dict[RequestKey, int]) -> StepInputs | None:
        """The tensors of a step; None when nothing is left to run. Raises IntegrityError for what cannot be run."""
        shape = self.shape(num_scheduled_tokens)
        if shape is None:
            return None
        # Token t of the step belongs to request owner[t].
        num_requests, num_tokens = len(shape.keys), shape.num_tokens
        if num_tokens == num_requests:
            token_slots, positions = shape.slots, shape.starts
        else:
            owner = np.repeat(np.arange(num_requests), shape.counts)
            positions = np.arange(num_tokens) + (shape.starts - shape.query_start[:-1])[owner]
            token_slots = shape.slots[owner]
        block, offset = np.divmod(positions, self._block_size)
        slot_mapping = self._block_table[token_slots, block].astype(np.int64) * self._block_size + offset
        input_ids = self._token_ids[token_slots, positions].astype(np.int64)
        width = -(-shape.max_seq_len // self._block_size)
        query_start_host, seq_lens_host = shape.query_start.astype(np.int32), shape.ends.astype(np.int32)
        attention = AttentionMetadata(
            query_start=self._tensor(query_start_host),
            seq_lens=self._tensor(seq_lens_host),
            block_tables=self._tensor(self._block_table[shape.slots, :width]),
            slot_mapping=self._tensor(slot_mapping),
            num_decodes=shape.num_decodes,
            query_start_host=query_start_host,
            seq_lens_host=seq_lens_host,
            max_seq_len=shape.max_seq_len,
        )
        return StepInputs(
            **vars(shape),
            input_ids=self._tensor(input_ids),
            positions=self._tensor(positions),
            attention=attention,
            logit_rows=self._tensor(shape.query_start[1:][shape.sampling] - 1),
        )

    def finish_step(self, shape: StepShape) -> None:
        """The tokens of a step are computed, or will be before anything asks for them."""
        self._num_computed[shape.slots] = shape.ends

    def append(self, slots: IntArray, token_ids: IntArray) -> None:
        """Append one sampled token to each of `slots`."""
        self.fill(slots, self._num_tokens[slots], token_ids)
        self.advance(slots)

    def advance(self, slots: IntArray) -> None:
        """One token more of each of `slots` is being sampled; which one `fill` tells later."""
        self._num_tokens[slots] += 1

    def fill(self, slots: IntArray, positions: IntArray, token_ids: IntArray) -> None:
        """The token at a position of each of `slots`."""
        self._token_ids[slots, positions] = token_ids

    def _slots_of(self, keys: list[RequestKey]) -> IntArray:
        """int64 [R]; not to be changed."""
        if keys != self._last_keys:
            try:
                self._last_slots = np.array([self._requests[key].slot for key in keys], dtype=np.int64)
            except KeyError as error:
                raise IntegrityError(f"request {error.args[0]} is scheduled but not known") from None
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
