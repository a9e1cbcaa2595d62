"""What runners ask of whatever guesses the next tokens of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from penstock.core.types import SamplingParams

IntArray = npt.NDArray[np.int64]
# (source block, target block)
Moves = Sequence[tuple[int, int]]


class Sequences(Protocol):
    """What a proposer may read of the runner's batch: PersistentBatch is one. Slots are small integers that requests live in."""

    def token_ids(self, slot: int) -> npt.NDArray[np.int32]:
        """Prompt and output so far, the newest token included, which has not been computed by the model yet; a view."""
        ...

    def block_ids(self, slot: int) -> npt.NDArray[np.int32]:
        """KV blocks of a request; a view."""
        ...


class Proposer(Protocol):
    """Guesses tokens. Everything is called in the order of the steps, by one thread.

    A proposer that keeps keys and values of its own keeps them in blocks of the same numbers as the model's, so that whatever is shared,
    copied or swapped there is so here as well.
    """

    def add(self, slot: int, num_computed_tokens: int, params: SamplingParams) -> None:
        """A request is new in `slot`, whose tokens and blocks are there to be read; the first `num_computed_tokens` came from the prefix
        cache, and what this proposer knows of their blocks still holds."""
        ...

    def remove(self, slot: int) -> None:
        """The request in `slot` is gone."""
        ...

    def move_blocks(self, swap_outs: Moves, swap_ins: Moves, copies: Moves) -> None:
        """Blocks were moved, in this order, before new requests were added: device to host, host to device, device to device."""
        ...

    def add_blocks(self, slot: int, block_ids: npt.NDArray[np.int32]) -> None:
        """`slot` got these blocks, whose contents belonged to somebody else before."""
        ...

    def propose(self, slots: IntArray, counts: IntArray) -> list[list[int]]:
        """Guesses at the next tokens of each of `slots` [R], at most counts[r] ≥ 1 of them; empty where there is none worth the while. A
        request has blocks for its tokens and counts[r] more, or the proposer gives fewer."""
        ...
