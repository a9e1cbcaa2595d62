"""One accepted request: what is asked of which engine, for whom, and for how long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec

from penstock.core.errors import InvalidRequestError
from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import EngineClient, GenerationRequest, Prompt
from penstock.serving.gateway.identity import Identity
from penstock.serving.gateway.results import Piece, PromptFacts
from penstock.serving.gateway.schemas.responses import Usage
from penstock.serving.gateway.schemas.sampling import GenerationBody
from penstock.serving.gateway.state import Gateway
from penstock.serving.gateway.streaming.sse import ChunkRenderer

TIMEOUT_HEADER = b"x-request-timeout"
_SMALLEST_PRIORITY = -(2**31)
_LARGEST_PRIORITY = 2**31 - 1

Body = TypeVar("Body", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class Call:
    """`id` is ours and appears in the answer; engine requests are `id-<number of the prompt>`. `timeout_s` bounds all of it."""

    id: str
    created: int
    model: str
    client: EngineClient
    identity: Identity
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    body: GenerationBody
    timeout_s: float
    queue_timeout_s: float

    def engine_requests(self, sampling: SamplingParams, timeout_s: float | None) -> list[GenerationRequest]:
        """One generation per prompt. `sampling` is the call's own, but for the seed perhaps."""
        return [
            GenerationRequest(
                request_id=f"{self.id}-{number}",
                prompt=prompt,
                sampling=sampling,
                priority=effective_priority(self.identity, self.body.priority),
                tenant=self.identity.tenant,
                weight=self.identity.weight,
                cache_salt=self.body.cache_salt or "",
                timeout_s=timeout_s,
                queue_timeout_s=self.queue_timeout_s,
            )
            for number, prompt in enumerate(self.prompts)
        ]


class Renderer(ChunkRenderer, Protocol):
    """The two forms of an endpoint's answer."""

    async def whole(self, pieces: Sequence[Piece], facts: dict[int, PromptFacts], usage: Usage) -> msgspec.Struct:
        """The answer to a request that does not stream. `pieces` are in the order of their index."""
        ...


@dataclass(frozen=True, slots=True)
class Kind(Generic[Body]):
    """What makes one endpoint: its body, what it asks of the engine, and its answer."""

    name: Literal["chat", "completions"]
    path: str
    id_prefix: str
    parse: Callable[[dict[str, Any]], Body]
    prompts: Callable[[Body], Sequence[Prompt]]
    sampling: Callable[[Body], SamplingParams]
    renderer: Callable[[Call, Body], Renderer]


def make_call(
    gateway: Gateway,
    call_id: str,
    body: GenerationBody,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    identity: Identity,
    headers: Sequence[tuple[bytes, bytes]],
) -> Call:
    """Raises NotFoundError for a model that does not exist or may not be used, InvalidRequestError for a time-out that is none."""
    model, client = gateway.resolve(body.model, identity)
    return Call(
        id=call_id,
        created=int(time.time()),
        model=model,
        client=client,
        identity=identity,
        prompts=prompts,
        sampling=sampling,
        body=body,
        timeout_s=_timeout(gateway.config.request_timeout_s, body.timeout, headers),
        queue_timeout_s=gateway.settings.max_queue_wait_s,
    )


def effective_priority(identity: Identity, asked: int) -> int:
    """Lower is served first. A client with an identity can make itself less urgent than its key, not more."""
    if identity.method == "none":
        return asked
    return max(_SMALLEST_PRIORITY, min(_LARGEST_PRIORITY, identity.priority + max(0, asked)))


def _timeout(longest_s: float, in_body: float | None, headers: Sequence[tuple[bytes, bytes]]) -> float:
    """The shortest of the server's, the body's and the header's bound."""
    timeouts = [longest_s] if in_body is None else [longest_s, in_body]
    for name, value in headers:
        if name == TIMEOUT_HEADER:
            timeouts.append(_seconds(value))
    return min(timeouts)


def _seconds(value: bytes) -> float:
    try:
        seconds = float(value[:32])
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InvalidRequestError("X-Request-Timeout must be a number of seconds above 0.", param="X-Request-Timeout")
    return seconds
