"""The persistent batch: what the runner remembers of each request, and how a step's diff becomes tensors.

A request lives in a slot from its NewRequest until it is finished or preempted. Everything is kept in host arrays with one row
per slot, so that a step is built with a few vectorised gathers, whatever the number of requests:

    token_ids     [ prompt | output …                | unused ]       row of a slot
                  0        num_prompt     num_tokens
    block_table   [ 7 | 3 | 12 | unused ]                             token t is in block_table[t // block_size]

Sampled tokens are appended here, by the runner: a step may start from a token that the scheduler has not seen yet. Where tokens stay
on a device, `advance` counts them when they are launched, and `fill` writes them down when they are known. Drafts that a step verifies are
written behind a request's tokens without being counted: those that are accepted are appended like any other token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.core.types import SamplingParams
from penstock.engine.step import CachedRequest, NewRequest, RequestKey
from penstock.execution.attention.context import AttentionMetadata
from penstock.execution.attention.metadata import on_device, paged_metadata, token_places

IntArray = npt.NDArray[np.int64]
Drafts = Mapping[RequestKey, list[int]]

_NO_DRAFTS: Drafts = {}


@dataclass(frozen=True)
class StepShape:
    """A step in numbers of the host. R requests in the order of the schedule, T tokens.

    keys, slots [R]; counts [R]: tokens scheduled; starts [R]: first position computed; ends [R]: behind the last position computed;
    query_start [R + 1]: first token of each request in the step, then T; num_decodes: so many requests at the beginning have one token.
    num_drafts [R]: how many of the tokens, the last ones, are drafts. sampling: indices into the R requests whose tokens are all computed
    after this step; sample_positions: position of the first token that each of them samples, one behind its last known token and behind
    each draft.
    """

    keys: list[RequestKey]
    slots: IntArray
    counts: IntArray
    starts: IntArray
    ends: IntArray
    query_start: IntArray
    num_decodes: int
    max_seq_len: int
    num_drafts: IntArray
    sampling: IntArray
    sample_positions: IntArray

    @property
    def num_tokens(self) -> int:
        return int(self.query_start[-1])


@dataclass(frozen=True)
class StepInputs(StepShape):
    """A step as tensors: input_ids, positions: int64 [T] on the device; attention: see AttentionMetadata; logit_rows: int64, the tokens
    behind which requests sample, 1 + num_drafts of each that does, one request after the other: indices into the T tokens."""

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

    def shape(self, num_scheduled_tokens: dict[RequestKey, int], drafts: Drafts = _NO_DRAFTS) -> StepShape | None:
        """The step without those that are broken; None when nothing is left to run. `drafts`: the tokens that some of the requests have
        behind the known ones in this step. Raises IntegrityError for what cannot be run."""
        if self._broken:
            num_scheduled_tokens = {key: n for key, n in num_scheduled_tokens.items() if key not in self._broken}
        if not num_scheduled_tokens:
            return None
        keys = list(num_scheduled_tokens)
        slots = self._slots_of(keys)
        counts: IntArray = np.array(list(num_scheduled_tokens.values()), dtype=np.int64)
        num_drafts: IntArray = np.zeros(len(keys), dtype=np.int64)
        lengths = self._num_tokens[slots]
        if drafts:
            num_drafts[:] = [len(drafts.get(key, ())) for key in keys]
            lengths = lengths + num_drafts
        starts = self._num_computed[slots]
        ends = starts + counts
        wrong = (ends > lengths) | (ends > self._num_blocks[slots] * self._block_size)
        if drafts:
            max_model_len = self._token_ids.shape[1] - 1
            wrong |= (num_drafts > 0) & ((ends != lengths) | (ends > max_model_len))
        if wrong.any():
            raise self._cannot_run(int(np.flatnonzero(wrong)[0]), keys, slots, ends, num_drafts)
        query_start: IntArray = np.zeros(len(keys) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        multiple = np.flatnonzero(counts != 1)
        sampling = np.flatnonzero(ends == lengths)
        sample_positions = ends[sampling]
        if drafts:
            sample_positions = sample_positions - num_drafts[sampling]
        return StepShape(
            keys=keys,
            slots=slots,
            counts=counts,
            starts=starts,
            ends=ends,
            query_start=query_start,
            num_decodes=int(multiple[0]) if len(multiple) else len(keys),
            max_seq_len=int(ends.max()),
            num_drafts=num_drafts,
            sampling=sampling,
            sample_positions=sample_positions,
        )

    def build(self, num_scheduled_tokens: dict[RequestKey, int], drafts: Drafts = _NO_DRAFTS) -> StepInputs | None:
        """The tensors of a step; None when nothing is left to run. `drafts`: see `shape`. Raises IntegrityError for what cannot be run."""
        shape = self.shape(num_scheduled_tokens, drafts)
        if shape is None:
            return None
        if drafts:
            self.write_drafts(shape, drafts)
        owners, positions = token_places(shape.starts, shape.query_start)
        token_slots = shape.slots if positions is shape.starts else shape.slots[owners]
        attention = paged_metadata(
            shape.query_start,
            shape.ends,
            self._block_table[shape.slots, : -(-shape.max_seq_len // self._block_size)],
            owners,
            positions,
            block_size=self._block_size,
            num_decodes=shape.num_decodes,
            max_seq_len=shape.max_seq_len,
            device=self._device,
        )
        return StepInputs(
            **vars(shape),
            input_ids=on_device(self._token_ids[token_slots, positions].astype(np.int64), self._device),
            positions=on_device(positions, self._device),
            attention=attention,
            logit_rows=on_device(
                _logit_rows(shape) if drafts else shape.query_start[1:][shape.sampling] - 1, self._device
            ),
        )

    def write_drafts(self, shape: StepShape, drafts: Drafts) -> None:
        """Write drafts behind the tokens of their requests, where the step finds them as inputs."""
        for index in np.flatnonzero(shape.num_drafts).tolist():
            slot, end = shape.slots[index], shape.ends[index]
            self._token_ids[slot, end - shape.num_drafts[index] : end] = drafts[shape.keys[index]]

    def finish_step(self, shape: StepShape) -> None:
        """The tokens of a step are computed, or will be before anything asks for them; its drafts do not count yet."""
        self._num_computed[shape.slots] = shape.ends - shape.num_drafts

    def append(self, slots: IntArray, token_ids: IntArray) -> None:
        """Append one sampled token to each of `slots`."""
        self.fill(slots, self._num_tokens[slots], token_ids)
        self.advance(slots)

    def extend(self, slot: int, token_ids: Sequence[int]) -> None:
        """Append what a step that verified drafts sampled: at least one token, all but the last of them drafts, which are computed."""
        first = int(self._num_tokens[slot])
        self._token_ids[slot, first : first + len(token_ids)] = token_ids
        self._num_tokens[slot] = first + len(token_ids)
        self._num_computed[slot] += len(token_ids) - 1

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

    def _cannot_run(
        self, row: int, keys: list[RequestKey], slots: IntArray, ends: IntArray, num_drafts: IntArray
    ) -> IntegrityError:
        slot, drafts = slots[row], int(num_drafts[row])
        return IntegrityError(
            f"request {keys[row]} is scheduled up to token {ends[row]} but has {self._num_tokens[slot]} tokens "
            f"{f'and {drafts} drafts ' if drafts else ''}and {self._num_blocks[slot]} blocks of {self._block_size}"
        )


def _logit_rows(shape: StepShape) -> IntArray:
    """int64: see StepInputs."""
    last = shape.query_start[1:][shape.sampling] - 1
    counts = shape.num_drafts[shape.sampling] + 1
    # Row k of the result is `last` of its request, less how far k is before that request's last row.
    ends = np.cumsum(counts)
    return np.repeat(last - ends + 1, counts) + np.arange(counts.sum())
