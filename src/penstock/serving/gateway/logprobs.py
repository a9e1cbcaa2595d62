"""Log-probabilities in OpenAI's two shapes, and where a token stands in the text.

A token whose bytes are not whole UTF-8 is written `bytes:\\xe2\\x82` in the completions shape, as OpenAI does, so that two different
tokens never share a name; the chat shape carries the bytes beside the text.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence

from penstock.serving.frontend.client import TokenLogprob, TopLogprob
from penstock.serving.gateway.schemas.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprobs,
    TopTokenLogprob,
)

# What OpenAI answers for a probability of zero; JSON has no infinity.
LOWEST = -9999.0


def finite(logprob: float) -> float:
    """`logprob`, or LOWEST for what JSON cannot say."""
    return logprob if math.isfinite(logprob) else LOWEST


def token_name(token: TokenLogprob | TopLogprob) -> str:
    """The token as the completions shape writes it."""
    try:
        token.token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token_bytes)
    return token.token


class TextOffsets:
    """Follows tokens through a text; `next` gives the character at which a token starts.

    Characters split over several tokens count for the token that completes them. With `text` given, a token that the text does not
    show (a special token that was skipped, a leading space that was stripped) takes no room.
    """

    def __init__(self, start: int = 0, text: str | None = None) -> None:
        self._position = start
        self._text = text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: TokenLogprob) -> int:
        offset = self._position
        shown = self._decoder.decode(token.token_bytes)
        if self._text is not None and not self._text.startswith(shown, offset):
            stripped = shown.removeprefix(" ")
            shown = stripped if stripped and self._text.startswith(stripped, offset) else ""
        self._position += len(shown)
        return offset


def completion_logprobs(tokens: Sequence[TokenLogprob], offsets: TextOffsets, top: int) -> CompletionLogprobs:
    """The completions shape. As with OpenAI, the alternatives include the token itself, so there can be top + 1 of them."""
    shape = CompletionLogprobs([], [], [], [])
    extend_completion_logprobs(shape, tokens, offsets, top)
    return shape


def extend_completion_logprobs(
    shape: CompletionLogprobs, tokens: Sequence[TokenLogprob], offsets: TextOffsets, top: int
) -> None:
    """Append `tokens` to `shape`."""
    for token in tokens:
        shape.tokens.append(token_name(token))
        shape.text_offset.append(offsets.next(token))
        if token.logprob is None:
            shape.token_logprobs.append(None)
            shape.top_logprobs.append(None)
            continue
        shape.token_logprobs.append(finite(token.logprob))
        alternatives: dict[str, float] = {}
        for other in token.top[:top]:
            alternatives.setdefault(token_name(other), finite(other.logprob))
        alternatives.setdefault(token_name(token), finite(token.logprob))
        shape.top_logprobs.append(alternatives)


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """The chat shape."""
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token.token,
                list(token.token_bytes),
                LOWEST if token.logprob is None else finite(token.logprob),
                [TopTokenLogprob(other.token, list(other.token_bytes), finite(other.logprob)) for other in token.top],
            )
            for token in tokens
        ]
    )


def prompt_logprobs(tokens: Sequence[TokenLogprob]) -> PromptLogprobs:
    """The extension `prompt_logprobs`: per token {id: {"logprob", "decoded_token"}}, the token itself first; the first entry is null."""
    entries: PromptLogprobs = []
    for token in tokens:
        if token.logprob is None:
            entries.append(None)
            continue
        entry = {str(token.token_id): {"logprob": finite(token.logprob), "decoded_token": token.token}}
        for other in token.top:
            entry.setdefault(str(other.token_id), {"logprob": finite(other.logprob), "decoded_token": other.token})
        entries.append(entry)
    return entries
