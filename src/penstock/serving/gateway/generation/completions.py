"""POST /v1/completions. Choices are numbered prompt by prompt: index = number of the prompt · n + sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from penstock.serving.gateway import logprobs as lp
from penstock.serving.gateway.generation.call import Call, Kind
from penstock.serving.gateway.results import News, Piece, PromptFacts, merge, prompt_facts
from penstock.serving.gateway.schemas.completions import CompletionBody
from penstock.serving.gateway.schemas.responses import Completion, CompletionChoice, CompletionLogprobs, Usage

PATH = "/v1/completions"


class CompletionRenderer:
    """Completion objects of one request. `echo` puts the prompt in front of every sample's text and, with `logprobs`, the prompt's
    tokens in front of the sample's."""

    def __init__(self, call: Call, body: CompletionBody) -> None:
        self._call = call
        self._body = body
        self._facts: dict[int, PromptFacts] = {}
        self._echoes: dict[int, str] = {}
        self._offsets: dict[int, lp.TextOffsets] = {}
        self._begun: set[int] = set()
        self._held: list[News] = []

    async def whole(self, pieces: Sequence[Piece], facts: dict[int, PromptFacts], usage: Usage) -> msgspec.Struct:
        self._facts = facts
        return self._object([await self._choice(piece, whole=True) for piece in pieces], usage)

    async def chunks(self, news: Sequence[News], usage: Usage | None) -> Sequence[msgspec.Struct]:
        self._facts.update(prompt_facts(news))
        self._held += news
        ready = [item for item in self._held if item[0] in self._facts or not self._needs_facts]
        self._held = [item for item in self._held if item[0] not in self._facts and self._needs_facts]
        # OpenAI's chunks say "usage": null while the usage is still to come.
        shown = UNSET if usage is None and not self._body.include_usage else usage
        return [
            self._object([await self._choice(piece, whole=False)], shown)
            for piece in merge(ready, self._call.sampling.n)
        ]

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        return self._object([], usage)

    @property
    def _needs_facts(self) -> bool:
        """True when a sample cannot begin before the prompt's tokens are known; they come with sample 0."""
        return self._body.return_token_ids or (self._body.echo and self._body.logprobs is not None)

    async def _choice(self, piece: Piece, *, whole: bool) -> CompletionChoice:
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        echo = await self._echo(piece.prompt) if first and self._body.echo else ""
        facts = self._facts.get(piece.prompt)
        choice = CompletionChoice(
            piece.index,
            echo + piece.text,
            self._logprobs(piece, echo, first=first),
            piece.finish_reason,
            piece.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = piece.token_ids
            if first and facts is not None:
                choice.prompt_token_ids = facts.token_ids
        if whole and self._body.prompt_logprobs is not None and facts is not None and facts.logprobs is not None:
            choice.prompt_logprobs = lp.prompt_logprobs(facts.logprobs)
        return choice

    async def _echo(self, prompt: int) -> str:
        """The prompt as text."""
        if prompt not in self._echoes:
            given = self._body.prompt[prompt]
            self._echoes[prompt] = given if isinstance(given, str) else await self._call.client.detokenize(given)
        return self._echoes[prompt]

    def _logprobs(self, piece: Piece, echo: str, *, first: bool) -> CompletionLogprobs | None:
        top = self._body.logprobs
        if top is None:
            return None
        shape = CompletionLogprobs([], [], [], [])
        if first:
            facts = self._facts.get(piece.prompt)
            if self._body.echo and facts is not None and facts.logprobs is not None:
                lp.extend_completion_logprobs(shape, facts.logprobs, lp.TextOffsets(text=echo), top)
            self._offsets[piece.index] = lp.TextOffsets(len(echo))
        lp.extend_completion_logprobs(shape, piece.logprobs, self._offsets[piece.index], top)
        return shape

    def _object(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        call = self._call
        return Completion(call.id, "text_completion", call.created, call.model, choices, usage)


def _checked(data: dict[str, Any]) -> CompletionBody:
    body = CompletionBody.parse(data)
    body.check()
    return body


COMPLETIONS = Kind(
    name="completions",
    path=PATH,
    id_prefix="cmpl",
    parse=_checked,
    prompts=lambda body: body.prompts(),
    sampling=CompletionBody.sampling,
    renderer=CompletionRenderer,
)
