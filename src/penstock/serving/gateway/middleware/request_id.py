"""The request's context, and X-Request-Id: the client's if it is printable ASCII of at most 128 characters, ours otherwise; returned,
and in every log line.

It is a label for people. Nothing inside uses it as a key.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.ids import RandomIds
from penstock.core.log import request_id_scope
from penstock.serving.gateway.context import RequestContext, set_context

HEADER = b"x-request-id"
_ACCEPTED = re.compile(rb"[!-~]{1,128}")


class RequestIdMiddleware:
    """Makes the RequestContext of a request, sets the request id of everything that happens inside, and adds the context's headers to
    whatever answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._ids = RandomIds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request_id = acceptable_request_id(scope["headers"]) or "req_" + self._ids.take()
        label = (HEADER, request_id.encode())
        context = RequestContext(request_id)
        set_context(scope, context)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *context.response_headers.items(), label]
            await send(message)

        with request_id_scope(request_id):
            await self.app(scope, receive, send_with_headers)


def acceptable_request_id(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The client's id if there is exactly one and it is acceptable."""
    given = [value for name, value in headers if name == HEADER]
    if len(given) == 1 and _ACCEPTED.fullmatch(given[0]):
        return given[0].decode("ascii")
    return None
