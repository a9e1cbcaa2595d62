"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from penstock.serving.gateway import logprobs as lp
from penstock.serving.gateway.generation.call import Call, Kind
from penstock.serving.gateway.results import News, Piece, PromptFacts, merge, prompt_facts
from penstock.serving.gateway.schemas.chat import ChatBody
from penstock.serving.gateway.schemas.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Usage,
)

PATH = "/v1/chat/completions"


class ChatRenderer:
    """Chat completion objects of one request. A choice's first chunk carries the role."""

    def __init__(self, call: Call, body: ChatBody) -> None:
        self._call = call
        self._body = body
        self._begun: set[int] = set()

    async def whole(self, pieces: Sequence[Piece], facts: dict[int, PromptFacts], usage: Usage) -> msgspec.Struct:
        call = self._call
        choices = [
            ChatChoice(
                piece.index,
                ChatMessage("assistant", piece.text),
                self._logprobs(piece),
                piece.finish_reason,
                piece.stop_reason,
                self._token_ids(piece),
            )
            for piece in pieces
        ]
        completion = ChatCompletion(call.id, "chat.completion", call.created, call.model, choices, usage)
        prompt = facts.get(0)
        if prompt is not None and self._body.return_token_ids:
            completion.prompt_token_ids = prompt.token_ids
        if prompt is not None and prompt.logprobs is not None:
            completion.prompt_logprobs = lp.prompt_logprobs(prompt.logprobs)
        return completion

    async def chunks(self, news: Sequence[News], usage: Usage | None) -> Sequence[msgspec.Struct]:
        # OpenAI's chunks say "usage": null while the usage is still to come.
        shown = UNSET if usage is None and not self._body.include_usage else usage
        facts = prompt_facts(news)
        chunks: list[ChatChunk] = []
        for piece in merge(news, self._call.sampling.n):
            if piece.index not in self._begun:
                self._begun.add(piece.index)
                role = ChatDelta(content="", role="assistant")
                chunks.append(self._chunk([ChatChunkChoice(piece.index, role, None, None)], shown))
                if piece.sample == 0 and 0 in facts and self._body.return_token_ids:
                    chunks[-1].prompt_token_ids = facts[0].token_ids
            delta = ChatDelta(content=piece.text) if piece.text or piece.finish_reason is None else ChatDelta()
            choice = ChatChunkChoice(
                piece.index,
                delta,
                self._logprobs(piece),
                piece.finish_reason,
                piece.stop_reason,
                self._token_ids(piece),
            )
            chunks.append(self._chunk([choice], shown))
        return chunks

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        call = self._call
        return ChatChunk(call.id, "chat.completion.chunk", call.created, call.model, choices, usage)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return lp.chat_logprobs(piece.logprobs) if self._body.logprobs else None

    def _token_ids(self, piece: Piece) -> list[int] | UnsetType:
        return piece.token_ids if self._body.return_token_ids else UNSET


def _checked(data: dict[str, Any]) -> ChatBody:
    body = ChatBody.parse(data)
    body.check()
    return body


CHAT = Kind(
    name="chat",
    path=PATH,
    id_prefix="chatcmpl",
    parse=_checked,
    prompts=lambda body: [body.prompt()],
    sampling=ChatBody.sampling,
    renderer=ChatRenderer,
)
