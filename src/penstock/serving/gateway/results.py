"""Collects the deltas of a request: per choice what it holds, over all prompts what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.serving.frontend.client import Delta, TokenLogprob
from penstock.serving.gateway.schemas.responses import Finish, PromptTokensDetails, Usage

# (number of the prompt, delta)
News = tuple[int, Delta]


@dataclass(slots=True)
class Piece:
    """A run of one choice: its whole output, or what came since the last chunk. `index` is the choice's in the response."""

    prompt: int
    sample: int
    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def extend(self, delta: Delta) -> None:
        """Append the next delta of this choice. Its finish_reason is "stop" or "length"; the stream has checked that."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs:
            self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason = "length" if delta.finish_reason == "length" else "stop"
            self.stop_reason = delta.stop_reason


@dataclass(slots=True)
class PromptFacts:
    """What the first delta of a prompt's sample 0 says about the prompt."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


class Tally:
    """Usage so far. Prompt tokens count once per prompt, output tokens per sample."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._outputs: dict[tuple[int, int], int] = {}
        self._usage: Usage | None = None

    def add(self, prompt: int, delta: Delta) -> None:
        self._prompts[prompt] = (delta.num_prompt_tokens, delta.num_cached_tokens)
        self._outputs[prompt, delta.index] = delta.num_output_tokens
        self._usage = None

    def usage(self) -> Usage:
        """What was used until now."""
        if self._usage is None:
            self._usage = self._sum()
        return self._usage

    def _sum(self) -> Usage:
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        cached = sum(cached for _, cached in self._prompts.values())
        completion_tokens = sum(self._outputs.values())
        return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptTokensDetails(cached))


def merge(news: Iterable[News], samples_per_prompt: int) -> list[Piece]:
    """One piece per choice, in the order in which the choices first occur in `news`."""
    pieces: dict[int, Piece] = {}
    for prompt, delta in news:
        index = prompt * samples_per_prompt + delta.index
        piece = pieces.get(index)
        if piece is None:
            piece = pieces[index] = Piece(prompt, delta.index, index)
        piece.extend(delta)
    return list(pieces.values())


def prompt_facts(news: Iterable[News]) -> dict[int, PromptFacts]:
    """What `news` says about prompts."""
    return {
        prompt: PromptFacts(delta.prompt_token_ids, delta.prompt_logprobs)
        for prompt, delta in news
        if delta.prompt_token_ids is not None
    }
