"""Drafts that are right as often as one likes: for measuring what an acceptance rate is worth. No server has this proposer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from penstock.core.types import SamplingParams
from penstock.execution.speculative.proposer import IntArray, Moves, Proposer, Sequences

# A request's tokens so far → all that it will ever have, these included.
Foresight = Callable[[npt.NDArray[np.int32]], Sequence[int]]


def recorded_answers(answers: Mapping[tuple[int, ...], Sequence[int]]) -> Foresight:
    """Foresight from what prompts were answered with before; nothing is foreseen of other prompts."""

    def foresee(tokens: npt.NDArray[np.int32]) -> Sequence[int]:
        known = tuple(tokens.tolist())
        for prompt, answer in answers.items():
            if known[: len(prompt)] == prompt:
                return [*prompt, *answer]
        return known

    return foresee


class OracleProposer:
    """Proposes what comes next, each token with probability `acceptance` and otherwise a wrong one; the same for the same requests in the
    same order, whatever they are batched with.

    stand_in: a proposer that does the work of proposing as well and whose drafts are thrown away, so that drafts cost what they would.
    """

    def __init__(
        self,
        sequences: Sequences,
        foresee: Foresight,
        *,
        acceptance: float,
        vocab_size: int,
        stand_in: Proposer | None = None,
        seed: int = 0,
    ) -> None:
        self._sequences = sequences
        self._foresee = foresee
        self.acceptance = acceptance
        self._vocab_size = vocab_size
        self._stand_in = stand_in
        self._seed = seed
        self._num_added = 0
        # By slot: the draft for every position.
        self._drafts: dict[int, list[int]] = {}

    def add(self, slot: int, num_computed_tokens: int, params: SamplingParams) -> None:
        """See Proposer."""
        self._num_added += 1
        right = np.array(self._foresee(self._sequences.token_ids(slot)), dtype=np.int64)
        chance = np.random.default_rng([self._seed, self._num_added]).random(len(right))
        self._drafts[slot] = np.where(chance < self.acceptance, right, (right + 1) % self._vocab_size).tolist()
        if self._stand_in is not None:
            self._stand_in.add(slot, num_computed_tokens, params)

    def remove(self, slot: int) -> None:
        """See Proposer."""
        self._drafts.pop(slot, None)
        if self._stand_in is not None:
            self._stand_in.remove(slot)

    def move_blocks(self, swap_outs: Moves, swap_ins: Moves, copies: Moves) -> None:
        """See Proposer."""
        if self._stand_in is not None:
            self._stand_in.move_blocks(swap_outs, swap_ins, copies)

    def add_blocks(self, slot: int, block_ids: npt.NDArray[np.int32]) -> None:
        """See Proposer."""
        if self._stand_in is not None:
            self._stand_in.add_blocks(slot, block_ids)

    def propose(self, slots: IntArray, counts: IntArray) -> list[list[int]]:
        """See Proposer."""
        if self._stand_in is not None:
            self._stand_in.propose(slots, counts)
        drafts = []
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            first = len(self._sequences.token_ids(slot))
            drafts.append(self._drafts[slot][first : first + count])
        return drafts
