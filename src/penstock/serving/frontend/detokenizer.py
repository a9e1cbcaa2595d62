"""Token ids to text while they arrive: never half a character, never part of a stop string, constant work per token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from penstock.serving.frontend.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"

# A window decoder gives up waiting for an unfinished character after this many tokens (no UTF-8 sequence is that long).
MAX_PENDING_TOKENS = 16


class Detokenizer(Protocol):
    """Turns one sample's token ids into text, in order."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        ...

    def finish(self) -> str:
        """What is left: U+FFFD for each unfinished sequence. Nothing may be fed afterwards."""
        ...


class ByteDetokenizer:
    """For tokenizers whose tokens stand for bytes: an incremental UTF-8 decoder over the tokens' bytes.

    Invalid bytes become U+FFFD as soon as it is certain that no valid sequence can follow from them, one per maximal invalid part
    (Unicode Standard, chapter 3.9), so the increments joined are the decoded whole.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, at_text_start: bool) -> None:
        self._bytes = tokenizer.token_bytes
        self._hidden: frozenset[int] = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._strip = at_text_start and self._bytes.strip_start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        table, hidden = self._bytes, self._hidden
        data = b"".join([table[token_id] for token_id in token_ids if token_id not in hidden])
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For any other decoder: decode a short window of tokens twice, without and with the new ones, and take the difference.

    The window starts at the tokens of the last increment, because decoders treat the first token of a text apart.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._decode = tokenizer.token_bytes.decode_window
        self._hidden: frozenset[int] = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, token_ids: Sequence[int]) -> str:
        parts = []
        for token_id in token_ids:
            if token_id in self._hidden:
                continue
            self._pending.append(token_id)
            text = self._difference()
            complete = text and not text.endswith(REPLACEMENT)
            if complete or len(self._pending) >= MAX_PENDING_TOKENS:
                parts.append(text)
                self._context, self._pending = self._pending, []
        return "".join(parts)

    def finish(self) -> str:
        text = self._difference()
        self._pending = []
        return text

    def _difference(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(before) :]


class NoTextDetokenizer:
    """For models without a tokenizer: there is no text."""

    def feed(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


def make_detokenizer(
    tokenizer: Tokenizer | None, *, skip_special_tokens: bool = True, at_text_start: bool = False
) -> Detokenizer:
    """The detokenizer for one sample. `at_text_start`: the output is a text of its own (a chat reply) and not the continuation of
    a prompt, so that a SentencePiece tokenizer's first space is dropped."""
    if tokenizer is None:
        return NoTextDetokenizer()
    if tokenizer.token_bytes.exact:
        return ByteDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, at_text_start=at_text_start)
    return WindowDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
