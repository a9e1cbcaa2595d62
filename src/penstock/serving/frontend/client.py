"""EngineClient: what the gateway knows of an engine, be it one process, a remote server or a fleet behind a balancer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.core.types import EngineStats, FinishReason, LiveLimits, ModelInfo, SamplingParams


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokensPrompt:
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages for the model's chat template: dictionaries with `role` and `content` (and what else the template reads)."""

    messages: Sequence[dict[str, Any]]
    add_generation_prompt: bool = True


Prompt = TextPrompt | TokensPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One generation, parsed and checked. `request_id` is ours. `timeout_s` bounds the whole generation, `queue_timeout_s` the wait before
    the engine begins with it: then it ends with OverloadedError. `weight`: the tenant's share of a busy engine."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    cache_salt: str = ""
    timeout_s: float | None = None
    queue_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token_id: int
    token: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token of the text and of its alternatives. `token_bytes` are exact where `token` is not valid UTF-8."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one sample.

    `text` extends the sample's text; it never ends inside a UTF-8 sequence and never contains part of a stop string. `offset` counts the
    sample's output tokens before `token_ids`. `prompt_token_ids` and `prompt_logprobs` (one entry per prompt token, the first without
    a value) come with the first delta of sample 0. The last delta of a sample has `finish_reason`; `stop_reason` is the stop string
    or token id that ended it. `num_output_tokens` is the running total, `num_prompt_tokens` and `num_cached_tokens` are the prompt's.
    `queue_time_s` comes once, with the first delta of a sample: the seconds it waited in the engine.
    """

    index: int
    text: str
    token_ids: list[int]
    offset: int
    num_output_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    queue_time_s: float | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """`live`: the client itself works. `ready`: requests are served. `reason` says why not."""

    live: bool
    ready: bool
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class EngineClient(Protocol):
    """Everything the gateway asks of an engine. All methods may be called concurrently from one event loop."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Yield deltas until every sample has finished.

        Raises a RequestError (see core.errors) as the request's one outcome when it fails. Closing the iterator early aborts the
        request. A slow reader gets merged deltas; it never slows the engine.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator raises AbortedError. Unknown ids are ignored."""
        ...

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises InvalidRequestError."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids. Raises InvalidRequestError for ids outside the vocabulary."""
        ...

    async def model_info(self) -> ModelInfo:
        """Raises EngineDeadError before the engine is ready for the first time."""
        ...

    async def configure(self, limits: LiveLimits) -> LiveLimits:
        """Change live limits and return those in force. Raises InvalidRequestError above the start-up ceiling."""
        ...

    async def stats(self) -> EngineStats | None:
        """The latest snapshot, None before the first."""
        ...

    def health(self) -> Health: ...

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and return when the running ones are done or `timeout_s` has passed; the rest is then aborted."""
        ...
