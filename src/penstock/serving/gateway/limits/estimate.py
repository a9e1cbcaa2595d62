"""What a request will probably cost, without tokenising: only for reservations, which the end of the request corrects.

docs/accounting.md states the rule. Text is one token per three bytes of UTF-8: above what tokenizers make of English (about four) and
of most other scripts, so that a reservation is seldom exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import ChatPrompt, Prompt, TextPrompt

BYTES_PER_TOKEN = 3
# Role and separators that a chat template puts around each message.
TOKENS_PER_MESSAGE = 4


def estimate(prompts: Sequence[Prompt], sampling: SamplingParams, reserve_output_tokens: int) -> tuple[int, int]:
    """Prompt tokens and output tokens of all prompts and samples. `reserve_output_tokens` stand for a `max_tokens` that is not given."""
    output_tokens = reserve_output_tokens if sampling.max_tokens is None else sampling.max_tokens
    return sum(map(_prompt_tokens, prompts)), output_tokens * sampling.n * len(prompts)


def _prompt_tokens(prompt: Prompt) -> int:
    if isinstance(prompt, TextPrompt):
        return max(1, _text_tokens(prompt.text))
    if isinstance(prompt, ChatPrompt):
        return max(1, sum(TOKENS_PER_MESSAGE + _content_tokens(message.get("content")) for message in prompt.messages))
    return max(1, len(prompt.token_ids))


def _content_tokens(content: object) -> int:
    """`content` of a chat message: text, a list of parts, or nothing."""
    if isinstance(content, str):
        return _text_tokens(content)
    if not isinstance(content, list):
        return 0
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return sum(_text_tokens(text) for text in texts if isinstance(text, str))


def _text_tokens(text: str) -> int:
    # Half of a surrogate pair is valid in JSON and must not fail here; the tokenizer decides what it is.
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return -(-size // BYTES_PER_TOKEN)
