"""A stream of server-sent events: the first token at once, then at most one event per choice and coalescing interval.

    start ─ first token ──▶ sent at once
                  ├ later tokens collect until `coalesce_s` after the last event, then leave together
                  ├ silence of `ping_s` ──▶ ": ping"
                  ├ end ──▶ last chunks, usage chunk if asked for, "data: [DONE]"
                  └ error ─▶ before the first byte: an ordinary HTTP error; later: one event {"error": …}, and no [DONE]

[DONE] says that an answer is complete, so an answer that failed never has it.
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.core.errors import AbortedError, RequestError
from penstock.serving.gateway.errors import as_request_error, error_body
from penstock.serving.gateway.results import News, Tally
from penstock.serving.gateway.schemas.responses import Usage
from penstock.serving.gateway.streaming.disconnect import while_connected
from penstock.serving.gateway.streaming.news_stream import NewsStream

logger = logging.getLogger(__name__)

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
# A client that takes nothing is cut off this long after the request's own deadline.
_STALLED_CLIENT_GRACE_S = 5.0

_encode = msgspec.json.Encoder().encode


class ChunkRenderer(Protocol):
    """Turns news into the chunk objects of one endpoint. Used for one stream."""

    async def chunks(self, news: Sequence[News], usage: Usage | None) -> Sequence[msgspec.Struct]:
        """Chunks for `news`, possibly none yet; `usage` goes into each when there is one."""
        ...

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The chunk without choices at the end of a stream."""
        ...


class SseResponse(Response):
    """Streams one request. `timeout_s` bounds all of it. `books` surrounds the generation and sees its error; `on_start` is called
    right before the head of the response leaves."""

    def __init__(
        self,
        *,
        open_stream: Callable[[], NewsStream],
        on_start: Callable[[], None],
        books: AbstractContextManager[object],
        tally: Tally,
        renderer: ChunkRenderer,
        include_usage: bool,
        continuous_usage: bool,
        coalesce_s: float,
        ping_s: float,
        timeout_s: float,
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._open_stream = open_stream
        self._on_start = on_start
        self._books = books
        self._tally = tally
        self._renderer = renderer
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._coalesce_s = coalesce_s
        self._ping_s = ping_s
        self._timeout_s = timeout_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes) -> None:
            if not self._started:
                self._started = True
                self._on_start()
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            with self._books:
                async with asyncio.timeout(self._timeout_s + _STALLED_CLIENT_GRACE_S):
                    await while_connected(receive, self._run(write))
        except RequestError as error:
            if not self._started:
                raise
            if isinstance(error, AbortedError):
                logger.info("client went away during the stream")
                return
            await write(b"data: " + error_body(error.info) + b"\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        try:
            async with self._open_stream() as stream:
                await self._pump(stream, write)
        except Exception as error:
            raise as_request_error(error) from None
        end = b""
        if self._include_usage:
            end = _event(self._renderer.usage_chunk(self._tally.usage()))
        await write(end + DONE)

    async def _pump(self, stream: NewsStream, write: Callable[[bytes], Awaitable[None]]) -> None:
        now = asyncio.get_running_loop().time
        seen: set[tuple[int, int]] = set()
        next_event_at = 0.0
        while True:
            if not await stream.wait(self._ping_s):
                if stream.ended:
                    return
                await write(PING)
                continue
            news = stream.take()
            if all((prompt, delta.index) in seen for prompt, delta in news):
                await stream.gather(next_event_at - now())
                news += stream.take()
            seen.update((prompt, delta.index) for prompt, delta in news)
            usage = self._tally.usage() if self._continuous_usage else None
            data = b"".join([_event(chunk) for chunk in await self._renderer.chunks(news, usage)])
            if data:
                await write(data)
                next_event_at = now() + self._coalesce_s


def _event(chunk: msgspec.Struct) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
