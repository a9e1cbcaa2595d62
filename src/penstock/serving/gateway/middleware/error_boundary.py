"""The last line: an exception that no handler took becomes a generic 500 with the request id, and a traceback in the log."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import RequestError
from penstock.serving.gateway.errors import error_response, internal_error, render_request_error

logger = logging.getLogger(__name__)


class ErrorBoundaryMiddleware:
    """When the response has begun, the exception goes on, so that the server cuts the connection and the client sees a broken answer
    instead of one that looks whole."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except RequestError as error:
            if started:
                raise
            await render_request_error(scope, receive, send, error)
        except Exception:
            logger.exception("unhandled exception")
            if started:
                raise
            await error_response(internal_error())(scope, receive, send)
