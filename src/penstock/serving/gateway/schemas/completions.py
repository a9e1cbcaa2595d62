"""Body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from penstock.core.errors import InvalidRequestError
from penstock.core.types import MAX_TOP_LOGPROBS, SamplingParams
from penstock.serving.frontend.client import TextPrompt, TokensPrompt
from penstock.serving.gateway.schemas.base import MAX_TOKEN_ID
from penstock.serving.gateway.schemas.sampling import MAX_TOKENS, GenerationBody

MAX_PROMPTS = 128
MAX_CHOICES = 1024
# OpenAI's default.
DEFAULT_MAX_TOKENS = 16

_PROMPT_TYPES = "must be a string, a list of strings, a list of token ids or a list of lists of token ids"


def _is_token_list(value: list[Any]) -> bool:
    """bool is a subclass of int, so `type(...) is int` and not isinstance."""
    return all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in value)


def _parse_prompt(value: Any) -> tuple[str | list[int], ...]:
    """One entry per prompt."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", _PROMPT_TYPES)
    if not value:
        raise PydanticCustomError("prompt_empty", "must not be empty")
    if type(value[0]) is int:
        if not _is_token_list(value):
            raise PydanticCustomError("prompt_type", _PROMPT_TYPES + "; a token id is an integer from 0")
        return (value,)
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError("too_long", f"has {len(value)} entries; at most {MAX_PROMPTS} are allowed")
    if all(isinstance(text, str) for text in value):
        return tuple(value)
    if not all(isinstance(tokens, list) and _is_token_list(tokens) for tokens in value):
        raise PydanticCustomError("prompt_type", _PROMPT_TYPES)
    if not all(value):
        raise PydanticCustomError("prompt_empty", "must not contain an empty list of token ids")
    return tuple(value)


_TOKENS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}}
Prompts = Annotated[
    tuple[str | list[int], ...],
    PlainValidator(_parse_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}},
                _TOKENS_SCHEMA,
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TOKENS_SCHEMA},
            ]
        }
    ),
]


class CompletionBody(GenerationBody):
    """https://platform.openai.com/docs/api-reference/completions/create and this server's extensions.

    `logprobs` may go to 20 here; OpenAI stops at 5.
    """

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": ("",)}

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = DEFAULT_MAX_TOKENS
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        """Raise InvalidRequestError for combinations that cannot be served."""
        self.check_streaming()
        if self.best_of not in (None, 0, self.n) and not (self.best_of == 1 and self.n == 1):
            raise InvalidRequestError(
                "'best_of' is not implemented by this server; leave it out or make it equal to 'n'.",
                param="best_of",
                code="unsupported_parameter",
            )
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise InvalidRequestError(
                f"{len(self.prompt)} prompts with n={self.n} are more than {MAX_CHOICES} choices.",
                param="n",
                code="invalid_value",
            )

    def prompts(self) -> list[TextPrompt | TokensPrompt]:
        """What the engine is asked, one entry per prompt."""
        return [
            TextPrompt(prompt, self.add_special_tokens) if isinstance(prompt, str) else TokensPrompt(prompt)
            for prompt in self.prompt
        ]

    def sampling(self) -> SamplingParams:
        """`echo` with `logprobs` wants the prompt's log-probabilities too."""
        prompt_logprobs = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            prompt_logprobs = max(self.logprobs, prompt_logprobs or 0)
        return self.sampling_params(max_tokens=self.max_tokens, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs)
