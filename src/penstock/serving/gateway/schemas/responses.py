"""Response objects, encoded by msgspec (a pydantic model per chunk would cost more than the network).

Field names and nullability are OpenAI's; what is not in OpenAI's objects is said to be an extension. A field that is UNSET does
not appear.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

Finish = Literal["stop", "length"]


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Struct):
    """`text_offset` counts characters from the start of the choice's `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


# Extension, one entry per prompt token, the first null: {token id: {"logprob", "decoded_token"}}, the token itself first.
PromptLogprobs = list[dict[str, dict[str, Any]] | None]


class CompletionChoice(Struct):
    """`stop_reason`, `token_ids`, `prompt_token_ids` and `prompt_logprobs` are extensions."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct):
    """Both the whole answer and a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None
    system_fingerprint: str | None = None


class TopTokenLogprob(Struct):
    token: str
    bytes: list[int]
    logprob: float


class ChatTokenLogprob(Struct):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopTokenLogprob]


class ChatLogprobs(Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(Struct):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Struct):
    """`stop_reason` and `token_ids` are extensions."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    """`prompt_token_ids` and `prompt_logprobs` are extensions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatDelta(Struct):
    content: str | UnsetType = UNSET
    role: Literal["assistant"] | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class Model(Struct):
    """`max_model_len` (an extension) is absent until the engine has started for the first time."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | UnsetType = UNSET


class ModelList(Struct):
    object: Literal["list"]
    data: list[Model]


class Tokenized(Struct):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(Struct):
    """`prompt` repeats `text`, under the name that other servers use."""

    text: str
    prompt: str


class Limits(Struct):
    model: str
    max_num_batched_tokens: int | None
    max_num_seqs: int | None
    max_prefill_tokens_while_decoding: int | None


class Status(Struct):
    status: str


class Version(Struct):
    version: str


class ErrorObject(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct):
    error: ErrorObject
