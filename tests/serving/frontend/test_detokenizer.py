"""Increments of text are exactly the decoded whole, cut only between characters."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.serving.frontend.detokenizer import make_detokenizer
from penstock.serving.frontend.tokenizer import Tokenizer

# The fixtures are shared, immutable tokenizers, so hypothesis may reuse them.
PROPERTY = settings(max_examples=80, deadline=None)
ANY_TEXT = st.text(max_size=40) | st.sampled_from(
    ["👨‍👩‍👧‍👦 family", "e\u0301 combining", "🏳️‍🌈", "日本語テキスト", "नमस्ते", "a\u200db", "\ufffd kept", "…—é"]
)


def increments(
    tokenizer: Tokenizer, ids: list[int], sizes: list[int], *, skip: bool = True, at_text_start: bool = True
) -> list[str]:
    """Feed `ids` in pieces of the given sizes, then finish."""
    detokenizer = make_detokenizer(tokenizer, skip_special_tokens=skip, at_text_start=at_text_start)
    parts, position, turn = [], 0, 0
    while position < len(ids):
        size = sizes[turn % len(sizes)]
        parts.append(detokenizer.feed(ids[position : position + size]))
        position, turn = position + size, turn + 1
    return [*parts, detokenizer.finish()]


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer._backend.token_to_id(token)
    assert found is not None
    return found


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@PROPERTY
@given(data=st.data(), sizes=SIZES, skip=st.booleans())
def test_any_byte_level_tokens(byte_level: Tokenizer, data: st.DataObject, sizes: list[int], skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=40))
    expected = byte_level.decode(ids, skip_special_tokens=skip)
    assert "".join(increments(byte_level, ids, sizes, skip=skip)) == expected


@PROPERTY
@given(text=ANY_TEXT, sizes=SIZES)
def test_any_text_byte_level(byte_level: Tokenizer, text: str, sizes: list[int]) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    parts = increments(byte_level, ids, sizes)
    assert "".join(parts) == text
    assert parts[-1] == ""
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@PROPERTY
@given(text=ANY_TEXT, sizes=SIZES)
def test_any_text_sentencepiece(sentencepiece: Tokenizer, text: str, sizes: list[int]) -> None:
    ids = sentencepiece.encode(text)
    assert "".join(increments(sentencepiece, ids, sizes)) == sentencepiece.decode(ids)


@PROPERTY
@given(ids=st.lists(st.integers(0, 7), max_size=20), sizes=SIZES)
def test_other_decoders(wordpiece: Tokenizer, ids: list[int], sizes: list[int]) -> None:
    assert "".join(increments(wordpiece, ids, sizes)) == wordpiece.decode(ids)


def test_an_unfinished_character_waits_for_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🙃", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = make_detokenizer(byte_level)
    assert detokenizer.feed(ids[:-1]) == ""
    assert detokenizer.finish() == "\ufffd"
    detokenizer = make_detokenizer(byte_level)
    assert [detokenizer.feed(ids[:-1]), detokenizer.feed(ids[-1:])] == ["", "🙃"]


@pytest.mark.parametrize(("at_text_start", "expected"), [(True, "hello world"), (False, " hello world")])
def test_the_first_space_of_a_continuation_stays(sentencepiece: Tokenizer, at_text_start: bool, expected: str) -> None:
    ids = [token_id(sentencepiece, token) for token in ("▁hello", "▁world")]
    assert "".join(increments(sentencepiece, ids, [1], at_text_start=at_text_start)) == expected


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = make_detokenizer(None)
    assert detokenizer.feed([1, 2]) == ""
    assert detokenizer.finish() == ""


def test_work_per_token_does_not_grow(byte_level: Tokenizer) -> None:
    # Stray continuation bytes are the worst case of detokenizers that decode everything since the last clean end.
    stray = token_id(byte_level, "Ģ")
    detokenizer = make_detokenizer(byte_level)
    begin = time.perf_counter()
    for _ in range(50_000):
        detokenizer.feed((stray,))
    assert time.perf_counter() - begin < 5
