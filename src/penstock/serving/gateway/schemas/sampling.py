"""The fields that completions and chat completions share, and how they become SamplingParams.

Bounds are OpenAI's where OpenAI has the field, and those of core.types.SamplingParams otherwise.
https://github.com/openai/openai-openapi
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from penstock.core.errors import InvalidRequestError
from penstock.core.types import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_LOGIT_BIAS,
    MAX_SAMPLES,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    SEED_RANGE,
    SamplingParams,
)
from penstock.serving.gateway.schemas.base import MAX_TOKEN_ID, ModelName, RequestModel, TokenId, at_most

MAX_TOKENS = 2**31 - 1
MAX_CACHE_SALT = 1024
MAX_CACHE_TTL_S = 86_400
# OpenAI allows 0, which leaves only the most likely token; so does any value this small.
_SMALLEST_TOP_P = 1e-6
_TOKEN_ID_KEY = re.compile("[0-9]{1,10}")


def _parse_stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(texts) > MAX_STOP_STRINGS:
        raise PydanticCustomError("too_long", f"has {len(texts)} entries; at most {MAX_STOP_STRINGS} are allowed")
    for text in texts:
        if not isinstance(text, str):
            raise PydanticCustomError("stop_type", "must be a string or a list of strings")
        if not 1 <= len(text) <= MAX_STOP_STRING_LENGTH:
            raise PydanticCustomError("stop_length", f"must have 1 to {MAX_STOP_STRING_LENGTH} characters per string")
    return tuple(texts)


def _parse_logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias_type", "must be an object of token id to bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("too_long", f"has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not _TOKEN_ID_KEY.fullmatch(key) or int(key) > MAX_TOKEN_ID:
            raise PydanticCustomError("logit_bias_key", "must have token ids as keys")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias_value", "must have numbers from -100 to 100 as values")
        biases[int(key)] = float(bias)
    return biases


Stop = Annotated[
    tuple[str, ...],
    PlainValidator(_parse_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_LENGTH},
                {
                    "type": "array",
                    "maxItems": MAX_STOP_STRINGS,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_LENGTH},
                },
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_parse_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]


class StreamOptions(RequestModel):
    """`include_obfuscation` has no effect."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class CacheOptions(RequestModel):
    """Wishes to the response cache. `use`: true takes part though the answer is sampled, false does not although it is deterministic.
    `ttl`: seconds that the answer is kept."""

    use: bool | None = None
    ttl: Annotated[float, Field(gt=0, le=MAX_CACHE_TTL_S)] | None = None
    no_store: bool = False
    no_cache: bool = False


class GenerationBody(RequestModel):
    """What a completion and a chat completion have in common."""

    model: ModelName
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: LogitBias = Field(default_factory=dict)
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS), at_most(MAX_ALLOWED_TOKEN_IDS)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=SEED_RANGE[0], le=SEED_RANGE[1])] | None = None
    stop: Stop = ()
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS), at_most(MAX_STOP_TOKEN_IDS)] = Field(
        default_factory=list
    )
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = 0
    timeout: Annotated[float, Field(gt=0, description="Longest time for the whole answer, in seconds.")] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT)] | None = None
    cache: CacheOptions | None = None
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(description="Accepted; has no effect.")] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_streaming(self) -> None:
        """Raise InvalidRequestError for combinations with `stream` that mean nothing."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options", code="invalid_value"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError(
                "'prompt_logprobs' cannot be streamed; completions stream 'echo' with 'logprobs'.",
                param="prompt_logprobs",
                code="invalid_value",
            )

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The engine's form of the shared fields; the endpoints differ in the three arguments."""
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=max(self.top_p, _SMALLEST_TOP_P),
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
        )
