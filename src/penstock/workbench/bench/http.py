"""A small HTTP/1.1 client for streams: one asyncio.Protocol, no reader task, a time stamp per received block of bytes.

The generator shares the machine with the server it measures, so a block of bytes costs one callback: it is stamped on arrival,
unframed (Content-Length, chunked, or until close; RFC 9112), split into server-sent events, and kept; nothing is decoded here.
Server-sent events are read as OpenAI-compatible servers write them: lines end with LF or CRLF, `data` is the only field
that matters, comment lines are skipped.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import cast

from penstock.core.errors import PenstockError

MAX_HEAD_BYTES = 64 * 1024
MAX_CHUNK_LINE_BYTES = 1024
DONE = b"[DONE]"


class HttpProtocolError(PenstockError):
    """The peer does not speak HTTP/1.1 as it should."""


class ConnectionClosedError(PenstockError):
    """The peer closed the connection before the response was complete. `started`: some of the response had arrived."""

    def __init__(self, *, started: bool) -> None:
        super().__init__(
            "The server closed the connection " + ("in mid-response." if started else "without a response.")
        )
        self.started = started


class EventSplitter:
    """Server-sent events out of bytes that arrive in any pieces. `feed` returns the data of each event that is now complete."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, payload: bytes) -> list[bytes]:
        *lines, self._buffer = (self._buffer + payload).split(b"\n")
        events = []
        for raw in lines:
            line = raw[:-1] if raw.endswith(b"\r") else raw
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class Response:
    """One response, filled by `feed` as bytes arrive.

    `events`: (arrival time, data) of each server-sent event except the closing "[DONE]", whose arrival sets `done`. `body`: all bytes of
    a response that is not an event stream. `complete`: the response's end has arrived; `keep_alive`: the connection can then be used again.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.events: list[tuple[float, bytes]] = []
        self.body = b""
        self.done = False
        self.complete = False
        self.keep_alive = True
        self.started = False
        self._raw = b""
        self._chunked = False
        self._remaining: int | None = None
        self._in_trailer = False
        self._splitter: EventSplitter | None = None

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes that arrived at `now`. Raises HttpProtocolError."""
        self.started = True
        self._raw = self._raw + data if self._raw else data
        while not self.status:
            if not self._read_head():
                return
        if self._chunked:
            self._read_chunks(now)
        else:
            self._read_plain(now)

    def feed_eof(self) -> None:
        """The peer closed. Completes a response whose end is the connection's end; raises ConnectionClosedError otherwise."""
        if self.status and not self._chunked and self._remaining is None:
            self.complete = True
        if not self.complete:
            raise ConnectionClosedError(started=self.started)

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > MAX_HEAD_BYTES:
                raise HttpProtocolError("The response's headers do not end.")
            return False
        status_line, *lines = self._raw[:end].decode("latin-1").split("\r\n")
        self._raw = self._raw[end + 4 :]
        match = re.fullmatch(r"HTTP/1\.([01]) (\d{3})(?: .*)?", status_line)
        if match is None:
            raise HttpProtocolError(f"Not an HTTP/1.1 response: {status_line[:80]!r}.")
        if match[2].startswith("1"):
            return bool(self._raw)
        self.status = int(match[2])
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        connection = self.headers.get("connection", "").lower()
        self.keep_alive = connection != "close" if match[1] == "1" else connection == "keep-alive"
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        if self.status in {204, 304}:
            length = "0"
        if not self._chunked and length is not None:
            if not length.isdecimal():
                raise HttpProtocolError(f"Content-Length is {length[:40]!r}.")
            self._remaining = int(length)
        if not self._chunked and length is None:
            self.keep_alive = False
        if self.headers.get("content-type", "").lower().startswith("text/event-stream"):
            self._splitter = EventSplitter()
        return True

    def _read_plain(self, now: float) -> None:
        payload, self._raw = self._raw, b""
        if self._remaining is not None:
            if len(payload) > self._remaining:
                raise HttpProtocolError("More bytes than Content-Length said.")
            self._remaining -= len(payload)
            self.complete = self._remaining == 0
        self._take(payload, now)

    def _read_chunks(self, now: float) -> None:
        """`_remaining` counts the bytes left of the current chunk with its closing CRLF; None: a size line comes next."""
        raw, position = self._raw, 0
        while not self.complete:
            if self._remaining is None:
                end = raw.find(b"\r\n", position)
                if end < 0:
                    if len(raw) - position > MAX_CHUNK_LINE_BYTES:
                        raise HttpProtocolError("A chunk's size line does not end.")
                    break
                line, position = raw[position:end], end + 2
                if self._in_trailer:
                    self.complete = not line
                    continue
                size = _chunk_size(line)
                self._in_trailer = size == 0
                self._remaining = size + 2 if size else None
                continue
            available = min(len(raw) - position, self._remaining)
            payload = min(available, self._remaining - 2)
            if payload > 0:
                self._take(raw[position : position + payload], now)
                position += payload
                self._remaining -= payload
            if self._remaining > 2 or len(raw) - position < 2:
                break
            if raw[position : position + 2] != b"\r\n":
                raise HttpProtocolError("A chunk is longer than its size line said.")
            position += 2
            self._remaining = None
        self._raw = raw[position:]

    def _take(self, payload: bytes, now: float) -> None:
        if self._splitter is None:
            self.body += payload
            return
        for event in self._splitter.feed(payload):
            if event == DONE:
                self.done = True
            else:
                self.events.append((now, event))


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", digits):
        raise HttpProtocolError(f"A chunk's size is {line[:40]!r}.")
    return int(digits, 16)


class Connection(asyncio.Protocol):
    """One connection, one request at a time. `usable`: it can take the next request."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._finished: asyncio.Future[None] | None = None

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and self._finished is None

    async def exchange(self, request: bytes, response: Response) -> None:
        """Send the request's bytes and wait until `response` is complete. Raises ConnectionClosedError or HttpProtocolError;
        what had arrived until then is in `response`. Cancelling it closes the connection."""
        transport = self._transport
        if not self.usable or transport is None:
            raise ConnectionClosedError(started=False)
        self._response = response
        self._finished = asyncio.get_running_loop().create_future()
        transport.write(request)
        try:
            await self._finished
        except BaseException:
            transport.abort()
            raise
        finally:
            self._finished = self._response = None
        if not response.keep_alive:
            transport.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface without the base class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        response, finished = self._response, self._finished
        if response is None or finished is None or finished.done():
            self.close()
            return
        try:
            response.feed(data, now)
        except HttpProtocolError as error:
            finished.set_exception(error)
            return
        if response.complete:
            finished.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._response is None or self._finished is None or self._finished.done():
            return
        try:
            if exc is not None:
                raise ConnectionClosedError(started=self._response.started) from exc
            self._response.feed_eof()
        except ConnectionClosedError as error:
            self._finished.set_exception(error)
        else:
            self._finished.set_result(None)
