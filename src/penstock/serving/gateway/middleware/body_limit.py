"""Refuses bodies above a size with 413: by Content-Length before reading, by counting while a body without one streams in."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import PayloadTooLargeError
from penstock.serving.gateway.errors import render_request_error


class BodyLimitMiddleware:
    """`receive` raises PayloadTooLargeError at the byte that is one too many; nothing after it is kept."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._announced(scope) > self.max_bytes:
            await render_request_error(scope, receive, send, self._error())
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.max_bytes:
                    raise self._error()
            return message

        await self.app(scope, counted, send)

    def _announced(self, scope: Scope) -> int:
        """Content-Length, 0 when there is none (the HTTP parser has refused malformed ones)."""
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        return max((int(value) for value in lengths if value.isdigit() and len(value) < 20), default=0)

    def _error(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(f"The body is larger than {self.max_bytes} bytes.")
