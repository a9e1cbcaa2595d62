"""A generation that was begun anew, joined to what its readers have: nothing twice, nothing lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import EngineError
from penstock.serving.frontend.client import Delta
from penstock.serving.gateway.cache.replay import join
from penstock.serving.gateway.cache.splice import Splice


def pieces(ids: list[int], text_of: Callable[[int], str], cuts: list[int]) -> list[Delta]:
    """One sample's deltas, cut at these places; `text_of`: the text after so many tokens."""
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    return [
        Delta(
            index=0,
            text=text_of(end)[len(text_of(start)) :],
            token_ids=ids[start:end],
            offset=start,
            num_output_tokens=end,
            num_prompt_tokens=2,
            prompt_token_ids=[1, 2] if start == 0 else None,
            finish_reason="stop" if end == len(ids) else None,
        )
        for start, end in itertools.pairwise(edges)
    ]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
    st.lists(st.lists(st.integers(1, 20), max_size=8), min_size=2, max_size=4),
    st.lists(st.integers(0, 21), min_size=3, max_size=3),
    st.integers(0, 3),
)
def test_a_splice_says_everything_once(ids: list[int], sources: list[list[int]], lengths: list[int], lag: int) -> None:
    """Sources that break off and begin anew, each in other pieces; text lags behind tokens until the end."""

    def text_of(tokens: int) -> str:
        shown = tokens if tokens == len(ids) else max(0, tokens - lag)
        return "".join(f"<{token}>" for token in ids[:shown])

    splice, delivered = Splice(), list[Delta]()
    for number, cuts in enumerate(sources):
        splice.restart()
        deltas = pieces(ids, text_of, cuts)
        last = number == len(sources) - 1
        for delta in deltas if last else deltas[: lengths[number]]:
            part = splice.new_part(0, delta)
            if part is not None:
                delivered.append(part)
    [(_, whole)] = join([(0, delta) for delta in delivered])
    assert whole.token_ids == ids
    assert whole.text == text_of(len(ids))
    assert whole.finish_reason == "stop"
    assert [delta.offset for delta in delivered] == [
        sum(len(before.token_ids) for before in delivered[:place]) for place in range(len(delivered))
    ]
    assert sum(delta.prompt_token_ids is not None for delta in delivered) == 1
    assert sum(delta.finish_reason is not None for delta in delivered) == 1


@pytest.mark.parametrize(
    "again",
    [
        Delta(0, "ab", [1, 9], 0, 2, 1),
        Delta(0, "xy", [1, 2], 0, 2, 1),
        Delta(0, "a", [1], 0, 1, 1, finish_reason="stop"),
        Delta(0, "ab", [1, 2], 1, 2, 1),
    ],
    ids=["tokens", "text", "end", "gap"],
)
def test_a_splice_refuses_what_does_not_fit(again: Delta) -> None:
    splice = Splice()
    assert splice.new_part(0, Delta(0, "ab", [1, 2], 0, 2, 1)) is not None
    splice.restart()
    with pytest.raises(EngineError) as caught:
        splice.new_part(0, again)
    assert caught.value.code == "generation_diverged"
