"""Drafts without a model: what followed the same tokens earlier in the request (prompt lookup; Saxena, "Prompt Lookup Decoding", 2023).

    tokens   … the red fox ran . … and the red fox
                           ▲▲▲▲▲           └──────┘ the last tokens were here before: what came then is the draft

Right where output quotes: summaries, edits of code, answers that take up the question. Nothing is kept between steps. A request's
tokens are searched whole, which for some thousands takes less time than looking after an index would.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from penstock.core.types import SamplingParams
from penstock.execution.speculative.proposer import IntArray, Moves, Sequences

# A longer match says more. Beyond four tokens it hardly does: four that are equal come from the same place nearly always.
LONGEST_MATCH = 4
# What follows a single token is nearly anything; after two, n-grams pay on text that repeats itself loosely.
SHORTEST_MATCH = 2
# Tokens that are searched, the newest ones. It bounds the time for one request to some tens of microseconds.
SEARCHED_TOKENS = 32_768


class NGramProposer:
    """Proposes what followed the most recent of the longest matches of a request's last tokens, as often as it takes to get the number
    that is wanted: a match that overlaps the end means that the text repeats itself."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences

    def add(self, slot: int, num_computed_tokens: int, params: SamplingParams) -> None:
        """Nothing is kept."""

    def remove(self, slot: int) -> None:
        """Nothing is kept."""

    def move_blocks(self, swap_outs: Moves, swap_ins: Moves, copies: Moves) -> None:
        """Nothing is kept."""

    def add_blocks(self, slot: int, block_ids: npt.NDArray[np.int32]) -> None:
        """Nothing is kept."""

    def propose(self, slots: IntArray, counts: IntArray) -> list[list[int]]:
        """See Proposer."""
        token_ids = self._sequences.token_ids
        return [
            _continuation(token_ids(slot)[-SEARCHED_TOKENS:], count)
            for slot, count in zip(slots.tolist(), counts.tolist(), strict=True)
        ]


def _continuation(tokens: npt.NDArray[np.int32], count: int) -> list[int]:
    """`count` tokens that may follow, or none."""
    end = _match_end(tokens)
    if end is None:
        return []
    followed: list[int] = tokens[end : end + count].tolist()
    # Tokens behind the last one are those of the draft itself.
    period = len(followed)
    return followed if period == count else [followed[index % period] for index in range(count)]


def _match_end(tokens: npt.NDArray[np.int32]) -> int | None:
    """Behind the most recent of the longest earlier occurrences of the last tokens; None when there is none."""
    if len(tokens) <= SHORTEST_MATCH:
        return None
    last = tokens[-SHORTEST_MATCH:].tolist()
    ends = _places(tokens, last)
    if not len(ends):
        return None
    for length in range(SHORTEST_MATCH + 1, LONGEST_MATCH + 1):
        if length >= len(tokens):
            break
        # Where the index is negative the match would begin before the tokens do; what is read from their end does not count.
        longer = ends[(tokens[ends - length] == tokens[-length]) & (ends >= length)]
        if not len(longer):
            break
        ends = longer
    return int(ends[-1])


def _places(tokens: npt.NDArray[np.int32], last: Sequence[int]) -> npt.NDArray[np.int64]:
    """Behind each earlier occurrence of `last`, ascending."""
    size = len(last)
    equal = tokens[size - 1 : -1] == last[-1]
    for offset in range(1, size):
        equal &= tokens[size - 1 - offset : -1 - offset] == last[-1 - offset]
    return np.flatnonzero(equal) + size
