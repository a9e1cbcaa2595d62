"""What a step says of drafts, in the terms of runners, and the proposer beside a runner's batch.

A proposer only guesses. Whatever goes wrong in it costs drafts and never a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from penstock.core.errors import IntegrityError
from penstock.engine.step import BlockMove, NewRequest, RequestKey, RunnerOutput, SchedulerOutput
from penstock.execution.runner.batch import NewBlocks, PersistentBatch, StepShape
from penstock.execution.sampling.masks import TokenMasks
from penstock.execution.speculative.proposer import Proposer

logger = logging.getLogger(__name__)


def verified_drafts(step: SchedulerOutput, shape: StepShape) -> list[list[int]]:
    """The drafts of each request that samples, in the order of `shape.sampling`; [] for those without."""
    return [step.draft_token_ids.get(shape.keys[index], []) for index in shape.sampling.tolist()]


def step_masks(step: SchedulerOutput, shape: StepShape) -> TokenMasks | None:
    """The step's masks by row of its logits; None when no request that samples has any. Raises IntegrityError when a request has not as
    many as it has rows."""
    if not step.token_masks:
        return None
    rows: list[int] = []
    masks: list[bytes] = []
    first = 0
    for index in shape.sampling.tolist():
        num_rows = 1 + int(shape.num_drafts[index])
        own = step.token_masks.get(shape.keys[index])
        if own is not None:
            if len(own) != num_rows:
                raise IntegrityError(f"request {shape.keys[index]} has {len(own)} masks for {num_rows} tokens")
            rows += range(first, first + num_rows)
            masks += own
        first += num_rows
    if not masks:
        return None
    bits = np.frombuffer(b"".join(masks), dtype=np.uint8).reshape(len(masks), -1)
    return TokenMasks(np.array(rows, dtype=np.int64), bits)


class Proposals:
    """A proposer that hears of the same changes as the batch; without one, nothing happens."""

    def __init__(self, proposer: Proposer | None, batch: PersistentBatch) -> None:
        self._proposer = proposer
        self._batch = batch
        self._logged = False

    def remove(self, slot: int) -> None:
        """The request in `slot` is gone."""
        if self._proposer is not None:
            with self._harmless():
                self._proposer.remove(slot)

    def add(self, slot: int, new: NewRequest) -> None:
        """The batch has given `new` this slot."""
        if self._proposer is not None:
            with self._harmless():
                self._proposer.add(slot, new.num_computed_tokens, new.sampling)

    def move_blocks(self, step: SchedulerOutput) -> None:
        """The step's blocks are moved; before its new requests are added."""
        if self._proposer is not None and (step.swap_outs or step.swap_ins or step.block_copies):
            with self._harmless():
                self._proposer.move_blocks(_pairs(step.swap_outs), _pairs(step.swap_ins), _pairs(step.block_copies))

    def add_blocks(self, added: Sequence[NewBlocks]) -> None:
        """What `PersistentBatch.update` returned."""
        if self._proposer is not None:
            with self._harmless():
                for new in added:
                    self._proposer.add_blocks(new.slot, self._batch.block_ids(new.slot)[new.first : new.end])

    def propose(self, num_proposals: Mapping[RequestKey, int], output: RunnerOutput) -> None:
        """Give `output`, whose tokens the batch has, as many drafts as a step asks for, and the time that they took. Requests that sampled
        nothing get none."""
        if self._proposer is None or not num_proposals:
            return
        begun = time.perf_counter()
        keys = [key for key in num_proposals if key in output.sampled_token_ids]
        if keys:
            with self._harmless():
                slots = np.array([self._batch.request(key).slot for key in keys], dtype=np.int64)
                counts = np.array([num_proposals[key] for key in keys], dtype=np.int64)
                drafts = self._proposer.propose(slots, counts)
                found = zip(keys, counts.tolist(), drafts, strict=True)
                output.draft_token_ids = {key: draft[:count] for key, count, draft in found if draft}
        output.draft_seconds = time.perf_counter() - begun

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if not self._logged:
                logger.exception(
                    "the proposer of draft tokens failed; such steps go on without drafts, and this is logged once"
                )
            self._logged = True


def _pairs(moves: Sequence[BlockMove]) -> list[tuple[int, int]]:
    return [(move.source, move.target) for move in moves]
