"""Bodies of the smaller routes: tokenize, detokenize, live limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from penstock.core.errors import InvalidRequestError
from penstock.core.types import LiveLimits
from penstock.serving.frontend.client import ChatPrompt, Prompt, TextPrompt
from penstock.serving.gateway.schemas.base import ModelName, RequestModel, TokenId, at_most
from penstock.serving.gateway.schemas.chat import Messages
from penstock.serving.gateway.schemas.sampling import MAX_TOKENS

MAX_DETOKENIZE = 1_048_576


class TokenizeBody(RequestModel):
    """Exactly one of `prompt`, `text` (another name of it) and `messages`. `model` may be left out when one model is served."""

    model: ModelName | None = None
    prompt: str | None = None
    text: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    def engine_prompt(self) -> Prompt:
        """What the engine is asked. Raises InvalidRequestError unless there is exactly one input."""
        given = [name for name in ("prompt", "text", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                "Give exactly one of 'prompt', 'text' and 'messages'.",
                param=given[1] if given else "prompt",
                code="invalid_value" if given else "missing_required_parameter",
            )
        if self.messages is not None:
            return ChatPrompt([message.for_template() for message in self.messages], self.add_generation_prompt)
        return TextPrompt(self.prompt or self.text or "", self.add_special_tokens)


class DetokenizeBody(RequestModel):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_DETOKENIZE, fail_fast=True), at_most(MAX_DETOKENIZE)]


class LimitsBody(RequestModel):
    """Limits to change; those left out stay as they are."""

    model: ModelName | None = None
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_prefill_tokens_while_decoding: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None

    def limits(self) -> LiveLimits:
        return LiveLimits(
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_prefill_tokens_while_decoding=self.max_prefill_tokens_while_decoding,
        )
