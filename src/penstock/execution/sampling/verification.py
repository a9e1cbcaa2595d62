"""Which tokens a step with drafts gives: where the rows of requests lie, and how far drafts were what was sampled.

rows of request r       t  │  d1   d2   d3          what is behind each: the logits of the next token
draft_behind            d1    d2   d3   -1
sampled                 d1    d2   x    (any)       new tokens: d1, d2, x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.core.types import TokenLogprobs

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class VerifiedTokens:
    """What R requests got.

    token_ids: 1 to 1 + drafts new tokens of each request, none if it failed. failed: bool [R], requests of which a row that counts has
    no distribution. logprobs: by request, one entry per new token, where they were asked for.
    """

    token_ids: list[list[int]]
    failed: BoolArray
    logprobs: dict[int, list[TokenLogprobs]]


class DraftRows:
    """Rows of logits, 1 + len(drafts[r]) of each request, request after request.

    start: int64 [R], first row of each request. request, offset: int64 [M], whose row it is, and which one. draft_behind: int64 [M], the
    draft that the token sampled from a row is compared with; -1, which no token is, in each request's last row.
    """

    def __init__(self, drafts: Sequence[Sequence[int]]) -> None:
        counts: IntArray = np.array([1 + len(some) for some in drafts], dtype=np.int64)
        self.start: IntArray = np.cumsum(counts) - counts
        self.request: IntArray = np.repeat(np.arange(len(counts)), counts)
        self.offset: IntArray = np.arange(len(self.request)) - self.start[self.request]
        self.draft_behind: IntArray = np.array([token for some in drafts for token in (*some, -1)], dtype=np.int64)

    def outcome(self, token_ids: IntArray, failed: BoolArray) -> tuple[IntArray, BoolArray]:
        """How many new tokens each request has, int64 [R], and whether the last of them failed, bool [R].

        token_ids, failed: [M]; what stands behind a row that is not the draft behind it is not looked at.
        """
        goes_on = (token_ids == self.draft_behind) & ~failed
        last = np.minimum.reduceat(np.where(goes_on, len(token_ids), self.offset), self.start)
        return last + 1, failed[self.start + last]

    def new_tokens(self, token_ids: IntArray, num_new: IntArray, failed: BoolArray) -> list[list[int]]:
        """Each request's new tokens."""
        tokens: list[int] = token_ids.tolist()
        ends = np.where(failed, self.start, self.start + num_new)
        return [tokens[start:end] for start, end in zip(self.start.tolist(), ends.tolist(), strict=True)]
