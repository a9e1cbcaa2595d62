"""Drafts from a smaller model with the same vocabulary (Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative
Decoding", 2023).

The draft model keeps keys and values of its own, in blocks with the numbers of the model's own blocks. It computes a request's tokens when
drafts are wanted of it and not before:

    tokens       [ valid: computed from what the tokens are | missing ]
    draft's KV   [ valid                                    | guesses: computed from drafts that may have been refused ]

Guesses that came true become valid; the missing tokens are computed in one pass, whose last row gives the first draft, and every further
draft is a pass of one token. A draft is sampled with the random number that the token itself will be sampled with, so that where both
models agree about the distribution they agree about the token.

A block that some request has filled stays valid for others that find it in the prefix cache. Whatever is not known to be valid is computed
anew: that costs time and is never wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.attention.backend import AttentionBackend, KVCache
from penstock.execution.attention.context import ForwardContext, forward_context
from penstock.execution.attention.metadata import on_device, paged_metadata, token_places
from penstock.execution.speculative.proposer import IntArray, Moves, Sequences

BlockTables = npt.NDArray[np.int32]


class Model(Protocol):
    """What is asked of a draft model, as of any model."""

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions int64 [T] → hidden states [T, hidden_size], inside a forward context."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [M, hidden_size] → logits float32 [M, vocab_size]."""
        ...


class TokenSource(Protocol):
    """What is asked of a sampler."""

    def peek(self, logits: Tensor, slots: IntArray, positions: IntArray) -> IntArray:
        """The tokens int64 [M] that the requests in `slots` [M] would get at `positions` [M] from logits [M, V]; nothing is remembered."""
        ...


@dataclass(frozen=True)
class DraftModel:
    """A model on `device` that drafts, its KV caches with a block for each of the large model's, one per layer, and those of the host tier
    likewise, empty without one. `max_model_len`: tokens that it can compute of a request, by its own context."""

    model: Model
    backend: AttentionBackend
    kv_caches: list[KVCache]
    host_caches: list[KVCache]
    max_model_len: int
    device: torch.device


@dataclass
class _Known:
    """What is computed of a request: `valid` tokens, then `guesses`. The first `marked` blocks are marked as valid for others."""

    valid: int
    marked: int
    guesses: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request of a call: its place in it, how many tokens it has, how many are missing, and how many drafts it can get."""

    index: int
    slot: int
    length: int
    missing: int
    count: int


@dataclass(frozen=True)
class _Move:
    source: int
    target: int


class DraftModelProposer:
    """Proposes what a draft model samples.

    max_tokens: most tokens of prompts and outputs that one call computes before it drafts. Requests with more of them missing get what is
    left by the others, and no drafts until they have caught up.
    """

    def __init__(self, draft: DraftModel, *, sequences: Sequences, sampler: TokenSource, max_tokens: int) -> None:
        self._draft = draft
        self._sequences = sequences
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._block_size = draft.kv_caches[0].block_size
        self._requests: dict[int, _Known] = {}
        # Which blocks are full of what the tokens of their requests are, on the device and in the host tier.
        self._valid = np.zeros(draft.kv_caches[0].num_blocks, dtype=np.bool_)
        self._host_valid = np.zeros(draft.host_caches[0].num_blocks if draft.host_caches else 0, dtype=np.bool_)

    def add(self, slot: int, num_computed_tokens: int, params: SamplingParams) -> None:
        """See Proposer."""
        blocks = self._sequences.block_ids(slot)
        found = num_computed_tokens // self._block_size
        self._valid[blocks[found:]] = False
        invalid = np.flatnonzero(~self._valid[blocks[:found]])
        usable = int(invalid[0]) if len(invalid) else found
        self._requests[slot] = _Known(usable * self._block_size, usable)

    def remove(self, slot: int) -> None:
        """See Proposer."""
        self._requests.pop(slot, None)

    def add_blocks(self, slot: int, block_ids: npt.NDArray[np.int32]) -> None:
        """See Proposer."""
        self._valid[block_ids] = False

    def move_blocks(self, swap_outs: Moves, swap_ins: Moves, copies: Moves) -> None:
        """See Proposer. Copies are made of blocks that are not full: they would not be valid in any case."""
        draft = self._draft
        for source, target in swap_outs:
            self._host_valid[target] = self._valid[source]
        kept = [_Move(source, target) for source, target in swap_outs if self._valid[source]]
        if kept:
            draft.backend.swap_out(draft.kv_caches, draft.host_caches, kept)
        for source, target in swap_ins:
            self._valid[target] = self._host_valid[source]
        kept = [_Move(source, target) for source, target in swap_ins if self._host_valid[source]]
        if kept:
            draft.backend.swap_in(draft.kv_caches, draft.host_caches, kept)
        self._valid[[target for _, target in copies]] = False

    @torch.inference_mode()
    def propose(self, slots: IntArray, counts: IntArray) -> list[list[int]]:
        """See Proposer."""
        drafts: list[list[int]] = [[] for _ in range(len(slots))]
        wanted = self._wanted(slots.tolist(), counts.tolist())
        if not wanted:
            return drafts
        chunks = self._chunks(wanted)
        requests = wanted[: len(chunks)]
        # Only the last may have got fewer tokens than it misses.
        num_ready = len(requests) - (chunks[-1] < requests[-1].missing)
        tables = self._block_tables(requests)
        guesses = self._catch_up(requests, chunks, tables, num_ready)
        ready = requests[:num_ready]
        if ready:
            for request, tokens in zip(ready, self._draft_on(ready, tables, guesses), strict=True):
                drafts[request.index] = tokens
                # The last one was not computed.
                self._requests[request.slot].guesses = tokens[:-1]
        return drafts

    def _wanted(self, slots: Iterable[int], counts: Iterable[int]) -> list[_Wanted]:
        """The requests that can have drafts, those with the fewest missing tokens first."""
        wanted = []
        for index, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            tokens = self._sequences.token_ids(slot)
            length = len(tokens)
            known = self._requests[slot]
            self._settle(slot, known, tokens)
            # The last draft is not computed here, but it will be by the large model.
            room = len(self._sequences.block_ids(slot)) * self._block_size - length
            most = min(count, room, self._draft.max_model_len + 1 - length)
            if most > 0:
                # The newest token is computed in any case: the first draft comes from it.
                known.valid = min(known.valid, length - 1)
                wanted.append(_Wanted(index, slot, length, length - known.valid, most))
        return sorted(wanted, key=lambda request: request.missing)

    def _chunks(self, wanted: list[_Wanted]) -> list[int]:
        """How many of the missing tokens of each request are computed, for as many requests as get any; only the last may get fewer than it
        misses."""
        chunks: list[int] = []
        room = self._max_tokens
        for request in wanted:
            chunks.append(min(request.missing, room))
            room -= chunks[-1]
            if chunks[-1] < request.missing or not room:
                break
        return [chunk for chunk in chunks if chunk]

    def _catch_up(self, requests: list[_Wanted], chunks: list[int], tables: BlockTables, num_ready: int) -> IntArray:
        """Compute missing tokens; the first draft of each of the first `num_ready` requests."""
        known = [self._requests[request.slot] for request in requests]
        spans = [
            self._sequences.token_ids(request.slot)[one.valid : one.valid + chunk]
            for request, one, chunk in zip(requests, known, chunks, strict=True)
        ]
        query_start: IntArray = np.zeros(len(requests) + 1, dtype=np.int64)
        np.cumsum(chunks, out=query_start[1:])
        slots = _numbers(request.slot for request in requests)
        starts = _numbers(one.valid for one in known)
        guesses = self._forward(np.concatenate(spans).astype(np.int64), slots, starts, query_start, tables, num_ready)
        for request, one, chunk in zip(requests, known, chunks, strict=True):
            one.valid += chunk
            self._mark(request.slot, one)
        return guesses

    def _draft_on(self, ready: list[_Wanted], tables: BlockTables, first: IntArray) -> list[list[int]]:
        """All drafts of requests whose tokens are computed and whose first drafts are `first`."""
        slots, lengths = _numbers(request.slot for request in ready), _numbers(request.length for request in ready)
        counts = _numbers(request.count for request in ready)
        drafts: IntArray = np.zeros((len(ready), int(counts.max())), dtype=np.int64)
        drafts[:, 0] = first
        rows: IntArray = np.arange(len(ready))
        for step in range(1, drafts.shape[1]):
            rows = rows[counts[rows] > step]
            query_start: IntArray = np.arange(len(rows) + 1)
            starts = lengths[rows] + (step - 1)
            drafts[rows, step] = self._forward(
                drafts[rows, step - 1], slots[rows], starts, query_start, tables[rows], len(rows)
            )
        return [draft[:count] for draft, count in zip(drafts.tolist(), counts.tolist(), strict=True)]

    def _forward(
        self,
        input_ids: IntArray,
        slots: IntArray,
        starts: IntArray,
        query_start: IntArray,
        tables: BlockTables,
        num_sampling: int,
    ) -> IntArray:
        """Compute input_ids [T], of which request r has those from query_start[r] to query_start[r + 1], from position starts[r] on.
        Returns what the first `num_sampling` requests sample behind them."""
        draft, device = self._draft, self._draft.device
        counts = query_start[1:] - query_start[:-1]
        owners, positions = token_places(starts, query_start)
        ends = starts + counts
        attention = paged_metadata(
            query_start,
            ends,
            tables,
            owners,
            positions,
            block_size=self._block_size,
            # A chunk that was cut to one token is the last one.
            num_decodes=int(np.cumprod(counts == 1).sum()),
            max_seq_len=int(ends.max()),
            device=device,
        )
        with forward_context(ForwardContext(attention, draft.kv_caches)):
            hidden = draft.model(on_device(input_ids, device), on_device(positions, device))
        if num_sampling < len(input_ids):
            if not num_sampling:
                return _numbers(())
            hidden = hidden[on_device(query_start[1 : num_sampling + 1] - 1, device)]
        return self._sampler.peek(draft.model.compute_logits(hidden), slots[:num_sampling], ends[:num_sampling])

    def _block_tables(self, requests: list[_Wanted]) -> BlockTables:
        """Wide enough for all that is computed in this call."""
        longest = max(request.length + request.count - 1 for request in requests)
        tables: BlockTables = np.zeros((len(requests), -(-longest // self._block_size)), dtype=np.int32)
        for row, request in zip(tables, requests, strict=True):
            blocks = self._sequences.block_ids(request.slot)[: len(row)]
            row[: len(blocks)] = blocks
        return tables

    def _settle(self, slot: int, known: _Known, tokens: npt.NDArray[np.int32]) -> None:
        """Guesses that came true are valid, and all others are forgotten."""
        came = tokens[known.valid : known.valid + len(known.guesses)].tolist()
        for guess, token_id in zip(known.guesses, came, strict=False):
            if guess != token_id:
                break
            known.valid += 1
        known.guesses = []
        self._mark(slot, known)

    def _mark(self, slot: int, known: _Known) -> None:
        """The blocks that are full of valid tokens are of use to others."""
        full = known.valid // self._block_size
        if full > known.marked:
            self._valid[self._sequences.block_ids(slot)[known.marked : full]] = True
            known.marked = full


def _numbers(values: Iterable[int]) -> IntArray:
    return np.fromiter(values, dtype=np.int64)
