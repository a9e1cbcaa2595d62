"""A small OpenAI-compatible streaming server in a thread: real HTTP on a loopback port, with failures and merging on request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Failure = Literal["", "status", "stream_error", "cut", "silent", "not_http", "no_done"]


@dataclass
class FakeOpenAI:
    """`tokens_per_event`: sizes of the events, the last repeats. `usage`: running, final or no token counts. `cached`: cached prompt tokens
    to report. `failing(n)`: how request number n (from 0) fails. `seen`: bodies received; `connections`: how many were accepted.
    """

    tokens_per_event: tuple[int, ...] = (1,)
    usage: Literal["continuous", "final", "none"] = "continuous"
    text: str = "x"
    cached: int = 0
    gap_s: float = 0.0
    keep_alive: bool = True
    status: int = 503
    failing: Callable[[int], Failure] = lambda number: ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    connections: int = 0
    running: int = 0
    most_running: int = 0
    url: str = ""

    def __enter__(self) -> FakeOpenAI:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer) and self.keep_alive:
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        length = next(
            int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")
        )
        body = await reader.readexactly(length)
        if head.startswith("GET /v1/models"):
            _plain(writer, 200, {"object": "list", "data": [{"id": "fake-model"}]})
            return True
        failure = self.failing(len(self.seen))
        self.seen.append(json.loads(body))
        if failure == "status":
            _plain(writer, self.status, {"error": {"message": "no room"}})
            return True
        if failure == "silent":
            await asyncio.sleep(60)
        if failure == "not_http":
            writer.write(b"SMTP ready\r\n\r\n")
            return False
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            return await self._stream(self.seen[-1], failure, writer)
        finally:
            self.running -= 1

    async def _stream(self, body: dict[str, Any], failure: Failure, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        prompt = body.get("prompt", "")
        counts = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": self.cached}}
        sent, event, total = 0, 0, body["max_tokens"]
        _chunk(writer, b": ping\n\n")
        while sent < total:
            if self.gap_s or event:
                await asyncio.sleep(self.gap_s)
            size = min(self.tokens_per_event[min(event, len(self.tokens_per_event) - 1)], total - sent)
            sent, event = sent + size, event + 1
            finish = "length" if sent == total else None
            payload: dict[str, Any] = {"choices": [{"index": 0, "text": self.text * size, "finish_reason": finish}]}
            if self.usage == "continuous":
                payload["usage"] = counts | {"completion_tokens": sent}
            _event(writer, payload)
            if failure == "cut" and sent >= total // 2:
                return False
        if failure == "stream_error":
            _event(writer, {"error": {"message": "engine died", "code": "engine_dead"}})
        elif self.usage != "none":
            _event(writer, {"choices": [], "usage": counts | {"completion_tokens": sent}})
        if failure != "no_done":
            _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def _plain(writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def _event(writer: asyncio.StreamWriter, payload: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(payload).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
