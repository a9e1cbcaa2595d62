"""Bodies that were parsed before: the same object for the same bytes, bounded, and only where that can be of use."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.core.errors import InvalidRequestError
from penstock.serving.gateway.generation.chat import CHAT
from penstock.serving.gateway.generation.parsed import MAX_BODIES, MAX_BODY_BYTES, Parser
from penstock.serving.gateway.schemas.chat import ChatBody


def raw(text: str = "hello", **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **more}).encode()


@pytest.fixture
def parser() -> Parser[ChatBody]:
    return Parser(CHAT)


def test_the_same_bytes_are_parsed_once(parser: Parser[ChatBody]) -> None:
    first = parser.parse(raw(temperature=0))
    assert parser.parse(raw(temperature=0)) is first
    assert parser.parse(raw(temperature=0, max_tokens=5)) is not first
    assert first.sampling.temperature == 0


def test_what_cannot_be_repeated_is_not_kept(parser: Parser[ChatBody]) -> None:
    assert parser.parse(raw()) is not parser.parse(raw())
    assert len(parser) == 0
    assert parser.parse(raw(seed=1)) is parser.parse(raw(seed=1))


def test_what_is_kept_is_bounded(parser: Parser[ChatBody]) -> None:
    kept = parser.parse(raw("kept", temperature=0))
    for number in range(MAX_BODIES - 1):
        parser.parse(raw(str(number), temperature=0))
        assert parser.parse(raw("kept", temperature=0)) is kept
    parser.parse(raw("one more", temperature=0))
    parser.parse(raw("and another", temperature=0))
    assert len(parser) == MAX_BODIES
    parser.parse(raw("x" * MAX_BODY_BYTES, temperature=0))
    assert len(parser) == MAX_BODIES


def test_a_wrong_body_is_wrong_every_time(parser: Parser[ChatBody]) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="temperature"):
            parser.parse(raw(temperature=9))
    assert len(parser) == 0
