import random

import numpy as np
import numpy.typing as npt
import pytest

from penstock.execution.speculative.ngram import LONGEST_MATCH, SEARCHED_TOKENS, SHORTEST_MATCH, NGramProposer


class Lists:
    """Tokens of requests, and no blocks."""

    def __init__(self, *sequences: list[int]) -> None:
        self._sequences = [np.array(tokens, dtype=np.int32) for tokens in sequences]

    def token_ids(self, slot: int) -> npt.NDArray[np.int32]:
        return self._sequences[slot]

    def block_ids(self, slot: int) -> npt.NDArray[np.int32]:
        return np.zeros(0, dtype=np.int32)


def propose(tokens: list[int], count: int) -> list[int]:
    (drafts,) = NGramProposer(Lists(tokens)).propose(np.array([0]), np.array([count]))
    return drafts


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2], [3, 4, 5, 9]),
        # The most recent of two places that are as long.
        ([1, 2, 3, 3, 1, 2, 4, 4, 7, 1, 2], [4, 4, 7, 1]),
        # A longer match before a more recent one.
        ([8, 1, 2, 3, 3, 9, 1, 2, 4, 4, 8, 1, 2], [3, 3, 9, 1]),
        ([6, 7, 8, 1, 2, 3, 5, 7, 8, 1, 2, 4, 6, 7, 8, 1, 2], [4, 6, 7, 8]),
        # What follows is not there yet: the text repeats itself.
        ([9, 1, 2, 1, 2], [1, 2, 1, 2]),
        ([5, 5, 5], [5, 5, 5, 5]),
        ([4, 1, 2, 3, 1, 2, 3], [1, 2, 3, 1]),
        # A single token is no match, the end itself is none, and there may be nothing to search.
        ([1, 2, 3, 4, 2], []),
        ([1, 2], []),
        ([1], []),
    ],
)
def test_drafts_are_what_followed_the_same_tokens(tokens: list[int], expected: list[int]) -> None:
    assert propose(tokens, 4) == expected
    assert propose(tokens, 1) == expected[:1]


def _searched(tokens: list[int], count: int) -> list[int]:
    """The definition, by looking at every place."""
    for length in range(min(LONGEST_MATCH, len(tokens) - 1), SHORTEST_MATCH - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                drafts = list(tokens)
                for offset in range(count):
                    drafts.append(drafts[end + offset])
                return drafts[len(tokens) :]
    return []


def test_it_is_what_a_search_of_every_place_finds() -> None:
    rng = random.Random(0)
    sequences = [[rng.randrange(1 + number % 6) for _ in range(rng.randint(1, 40))] for number in range(200)]
    counts = [rng.randint(1, 9) for _ in sequences]
    found = NGramProposer(Lists(*sequences)).propose(np.arange(200), np.array(counts))
    assert found == [_searched(tokens, count) for tokens, count in zip(sequences, counts, strict=True)]
    assert any(found)


def test_only_the_newest_tokens_are_searched() -> None:
    phrase = [-1, -2, -3]
    filler = list(range(SEARCHED_TOKENS))
    assert propose([*phrase, *filler[: -len(phrase) - 2], *phrase[:2]], 1) == [-3]
    assert propose([*phrase, *filler, *phrase[:2]], 1) == []
