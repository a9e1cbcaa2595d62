"""Proposers for a harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from penstock.core.types import SamplingParams
from penstock.execution.models.registry import LoadedModel
from penstock.execution.speculative.draft_model import DraftModel, DraftModelProposer, Model
from penstock.execution.speculative.ngram import NGramProposer
from penstock.execution.speculative.proposer import IntArray, Moves, Proposer
from tests.execution.runner.harness import CPU, MAX_MODEL_LEN, Harness, poisoned_caches


def ngrams(harness: Harness) -> NGramProposer:
    return NGramProposer(harness.batch)


def draft_model(
    draft: LoadedModel, *, max_tokens: int = 64, max_model_len: int = MAX_MODEL_LEN, model: Model | None = None
) -> Callable[[Harness], DraftModelProposer]:
    """The proposer over `draft`, whose cache memory is NaN until it is written. `model`: what runs in place of the draft's own."""

    def make(harness: Harness) -> DraftModelProposer:
        parts = DraftModel(
            model=model or draft.model,
            backend=draft.attention_backend,
            kv_caches=poisoned_caches(draft, harness.kv_caches[0].num_blocks),
            host_caches=poisoned_caches(draft, harness.host_caches[0].num_blocks),
            max_model_len=max_model_len,
            device=CPU,
        )
        return DraftModelProposer(parts, sequences=harness.batch, sampler=harness.sampler, max_tokens=max_tokens)

    return make


class Turns:
    """Place by place another proposer's drafts: the first draft is the first one's, the second the second one's, and so on."""

    def __init__(self, proposers: Sequence[Proposer]) -> None:
        self._proposers = proposers

    def add(self, slot: int, num_computed_tokens: int, params: SamplingParams) -> None:
        for proposer in self._proposers:
            proposer.add(slot, num_computed_tokens, params)

    def remove(self, slot: int) -> None:
        for proposer in self._proposers:
            proposer.remove(slot)

    def move_blocks(self, swap_outs: Moves, swap_ins: Moves, copies: Moves) -> None:
        for proposer in self._proposers:
            proposer.move_blocks(swap_outs, swap_ins, copies)

    def add_blocks(self, slot: int, block_ids: npt.NDArray[np.int32]) -> None:
        for proposer in self._proposers:
            proposer.add_blocks(slot, block_ids)

    def propose(self, slots: IntArray, counts: IntArray) -> list[list[int]]:
        found = [proposer.propose(slots, counts) for proposer in self._proposers]
        return [
            [drafts[place % len(drafts)][place] for place in range(min(map(len, drafts)))]
            for drafts in zip(*found, strict=True)
        ]
