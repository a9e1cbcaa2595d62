"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from penstock.core.errors import InvalidRequestError
from penstock.core.types import MAX_TOP_LOGPROBS, SamplingParams
from penstock.serving.frontend.client import ChatPrompt
from penstock.serving.gateway.schemas.base import RequestModel, at_most
from penstock.serving.gateway.schemas.sampling import MAX_TOKENS, GenerationBody

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_METADATA = 16

_NOT_IMPLEMENTED = "is not implemented by this server"


def _parse_content(value: Any) -> str:
    """A message's text; text parts are joined by a line break."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be a string or a list of text parts")
    if len(value) > MAX_PARTS:
        raise PydanticCustomError("too_long", f"has {len(value)} entries; at most {MAX_PARTS} are allowed")
    texts: list[str] = []
    for position, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("content_type", "must be a string or a list of text parts")
        if part["type"] != "text":
            raise PydanticCustomError("unsupported_parameter", _NOT_IMPLEMENTED, {"path": [position, "type"]})
        unknown = next((name for name in part if name not in ("type", "text") and part[name] is not None), None)
        if unknown is not None:
            raise PydanticCustomError("unknown_parameter", "is not a known field", {"path": [position, unknown]})
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content_type", "must have a string as 'text' in every part")
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[
    str,
    PlainValidator(_parse_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "maxItems": MAX_PARTS,
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]


class Message(RequestModel):
    """One message. `developer` is another name of `system`. What an answer of ours holds can be sent back as it is."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "function_call": (),
        "refusal": ("",),
        "audio": (),
        "annotations": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[str, Field(max_length=256)] | None = None

    def for_template(self) -> dict[str, Any]:
        """The dictionary that the model's chat template reads."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), at_most(MAX_MESSAGES)]
NoEffect = Field(description="Accepted; has no effect.")


class ChatBody(GenerationBody):
    """https://platform.openai.com/docs/api-reference/chat/create and this server's extensions."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "moderation": (),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "store": (False,),
        "continue_final_message": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
    }

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    metadata: Annotated[dict[str, str], NoEffect, at_most(MAX_METADATA)] | None = None
    service_tier: Annotated[Literal["auto", "default", "flex", "scale", "priority", "fast"], NoEffect] | None = None
    safety_identifier: Annotated[str, NoEffect] | None = None
    prompt_cache_key: Annotated[str, NoEffect] | None = None
    prompt_cache_retention: Annotated[Literal["in_memory", "24h"], NoEffect] | None = None
    parallel_tool_calls: Annotated[bool, NoEffect] | None = None

    def check(self) -> None:
        """Raise InvalidRequestError for combinations that cannot be served."""
        self.check_streaming()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs", code="invalid_value"
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequestError(
                "'max_tokens' and 'max_completion_tokens' differ; set one of them.",
                param="max_tokens",
                code="invalid_value",
            )

    def prompt(self) -> ChatPrompt:
        """What the engine is asked."""
        return ChatPrompt([message.for_template() for message in self.messages], self.add_generation_prompt)

    def sampling(self) -> SamplingParams:
        """Without a limit an answer may fill the model's context."""
        return self.sampling_params(
            max_tokens=self.max_completion_tokens if self.max_tokens is None else self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )
