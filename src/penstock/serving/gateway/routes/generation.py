"""What completions and chat completions share: one body becomes one or several generations, whole or streamed."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import Delta, EngineClient, GenerationRequest, Prompt
from penstock.serving.gateway.errors import as_request_error
from penstock.serving.gateway.measure import Measurement
from penstock.serving.gateway.results import News, Piece, PromptFacts, Tally, merge, prompt_facts
from penstock.serving.gateway.schemas.responses import Usage
from penstock.serving.gateway.schemas.sampling import GenerationBody
from penstock.serving.gateway.state import Gateway
from penstock.serving.gateway.streaming.delta_stream import DeltaStream
from penstock.serving.gateway.streaming.disconnect import while_connected
from penstock.serving.gateway.streaming.sse import ChunkRenderer, SseResponse


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request. `id` is ours and appears in the answer; engine requests are `id-<number of the prompt>`."""

    id: str
    created: int
    model: str
    client: EngineClient
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    body: GenerationBody


class Renderer(ChunkRenderer, Protocol):
    """The two forms of an endpoint's answer."""

    async def whole(self, pieces: Sequence[Piece], facts: dict[int, PromptFacts], usage: Usage) -> msgspec.Struct:
        """The answer to a request that does not stream. `pieces` are in the order of their index."""
        ...


def make_job(
    gateway: Gateway, body: GenerationBody, prompts: Sequence[Prompt], sampling: SamplingParams, id_prefix: str
) -> Job:
    """Raises NotFoundError for an unknown model, OverloadedError during shutdown."""
    model, client = gateway.resolve(body.model)
    gateway.check_accepting()
    return Job(f"{id_prefix}-{secrets.token_hex(16)}", int(time.time()), model, client, prompts, sampling, body)


async def answer(gateway: Gateway, request: Request, job: Job, renderer: Renderer) -> Response:
    """Run the job. Raises the request's error; for a stream that happens when the response is sent."""
    tally = Tally()
    measurement = Measurement(gateway, job.model, tally)
    config = gateway.config

    def on_delta(prompt: int, delta: Delta) -> None:
        tally.add(prompt, delta)
        measurement.on_delta(prompt, delta)

    def open_stream() -> DeltaStream:
        return DeltaStream(
            job.client, _engine_requests(job, config.request_timeout_s), on_delta, config.request_timeout_s
        )

    if job.body.stream:
        return SseResponse(
            open_stream=open_stream,
            measurement=measurement,
            tally=tally,
            renderer=renderer,
            include_usage=job.body.include_usage,
            continuous_usage=job.body.continuous_usage,
            coalesce_s=config.stream_coalesce_s,
            ping_s=config.sse_ping_s,
            timeout_s=config.request_timeout_s,
        )
    with measurement:
        news = await while_connected(request.receive, _collect(open_stream(), config.request_timeout_s))
        pieces = sorted(merge(news, job.sampling.n), key=lambda piece: piece.index)
        whole = await renderer.whole(pieces, prompt_facts(news), tally.usage())
    return json_response(whole)


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """A response object as HTTP response."""
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")


async def _collect(stream: DeltaStream, timeout_s: float) -> list[News]:
    news: list[News] = []
    try:
        async with stream:
            # A wait without news says nothing: the clock may be a hair short of the deadline, which then raises.
            while await stream.wait(timeout_s) or not stream.ended:
                # Deltas by the handful instead of one by one: nobody reads a part of this answer.
                await stream.gather(0.05)
                news += stream.take()
    except Exception as error:
        raise as_request_error(error) from None
    return news


def _engine_requests(job: Job, timeout_s: float) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"{job.id}-{number}",
            prompt=prompt,
            sampling=job.sampling,
            priority=job.body.priority,
            cache_salt=job.body.cache_salt or "",
            timeout_s=timeout_s,
        )
        for number, prompt in enumerate(job.prompts)
    ]
