"""uvicorn's HTTP protocol with bounds on what one connection may cost.

| bound | what happens |
|---|---|
| connections of this process | 503 before anything is parsed, then closed |
| bytes of a head, or of anything that is not body | 431, closed (the httptools parser collects header lines and trailers without end) |
| seconds for a head, and again for a body | 408, closed; a connection that never sent a byte is closed without a word |
| seconds in which a client takes nothing of what waits for it | cut off |

Refusals have the shape of every other error. None is written into the middle of an answer: then the connection only ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from dataclasses import dataclass
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.core.errors import ErrorInfo
from penstock.serving.gateway.errors import error_body
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

MAX_HEAD_BYTES = 65_536
# A refused client may still be sending; closing at once would reset the connection before it has read why.
LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """`max_connections` of this process; `read_timeout_s` for a head and again for a body; `write_timeout_s` without any byte taken."""

    max_connections: int = 4096
    read_timeout_s: float = 30.0
    write_timeout_s: float = 30.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. `_phase`: what the client has begun to send. `_loose_bytes`: received since the last message or the last piece of a
    body (at most one read is missing). `_deaf`: refused; what comes is dropped.

    A request that comes in one read, as nearly all do, starts no timer."""

    def __init__(
        self, *args: Any, limits: HttpLimits | None = None, recorder: Recorder | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits if limits is not None else HttpLimits()
        self._recorder = recorder if recorder is not None else Recorder()
        self._phase: Literal["nothing", "head", "body"] = "nothing"
        self._phase_is_new = False
        self._loose_bytes = 0
        self._deaf = False
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # ---- the connection ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = self._limits.max_connections
        if len(self.connections) > most:
            self._recorder.increment(metrics.REFUSED, "connections")
        if len(self.connections) > 2 * most:
            transport.abort()
        elif len(self.connections) > most:
            message = "The server has too many open connections. Retry shortly."
            self._refuse(
                503, "Service Unavailable", message, "overloaded_error", "too_many_connections", b"retry-after: 1\r\n"
            )
        else:
            self._start_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._loose_bytes += len(data)
        super().data_received(data)
        if self._deaf or self.transport.is_closing():
            return
        if self._loose_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "Request Header Fields Too Large", "The request's headers are too large.")
        elif self._phase_is_new:
            self._phase_is_new = False
            self._stop_read_timer()
            if self._phase != "nothing":
                self._start_read_timer()
        elif self._read_timer is None:
            # Empty lines before a request have ended uvicorn's keep-alive time.
            self._start_read_timer()

    # ---- the parser ----

    def on_message_begin(self) -> None:
        self._enter("head")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._enter("body")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._loose_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._enter("nothing")
        super().on_message_complete()

    def _enter(self, phase: Literal["nothing", "head", "body"]) -> None:
        self._phase = phase
        self._phase_is_new = True
        if phase != "head":
            self._loose_bytes = 0

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets OpenAI's error object too."""
        self._refuse(400, "Bad Request", msg)

    # ---- a client that does not send ----

    def _start_read_timer(self) -> None:
        self._read_timer = self.loop.call_later(self._limits.read_timeout_s, self._read_too_slow)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _read_too_slow(self) -> None:
        self._read_timer = None
        if self._phase == "nothing":
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()
            return
        self._refuse(
            408, "Request Timeout", f"The {self._phase} of the request did not arrive in time.", code="request_timeout"
        )

    # ---- a client that does not read ----

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._start_write_timer()

    def _start_write_timer(self) -> None:
        """Watch what waits to be sent, if anything does."""
        self._stop_write_timer()
        if self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(
                self._limits.write_timeout_s, self._check_writing, self._unsent_bytes()
            )

    def _unsent_bytes(self) -> int:
        """Bytes that the client has not taken: ours and the kernel's. The kernel takes ours in large steps only, so that without its part
        a slow reader would look like one that stands still."""
        waiting = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket")
        try:
            return waiting + int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):  # the socket is closed; what the transport says remains
            return waiting

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _check_writing(self, before: int) -> None:
        self._write_timer = None
        if self._unsent_bytes() >= before:
            self.transport.abort()
        else:
            self._start_write_timer()

    # ---- refusals ----

    def _refuse(
        self,
        status: int,
        phrase: str,
        message: str,
        type: str = "invalid_request_error",
        code: str = "invalid_http",
        extra: bytes = b"",
    ) -> None:
        """End the connection, with an error unless an answer is being written."""
        self._deaf = True
        self._stop_read_timer()
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and self._phase != "body" and not cycle.response_complete:
            # The answer to an earlier request comes first; nothing follows it.
            cycle.keep_alive = False
            return
        if cycle is not None and self._phase == "body" and cycle.response_started:
            self.transport.close()
            return
        body = error_body(ErrorInfo(message=message, status=status, type=type, code=code))
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        self.transport.write(head.encode() + extra + b"\r\n" + body)
        if cycle is not None:
            # The application, if it waits for the rest of this request, learns that it will not come.
            cycle.disconnected = True
            cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self.loop.call_later(LAST_WORDS_S, self.transport.abort)
        else:
            self.transport.close()
