"""uvicorn's HTTP protocol with a bound on the head of a request.

The httptools parser collects header lines without end; here a head above MAX_HEAD_BYTES ends the connection with 431, in the shape of
every other error.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.core.errors import ErrorInfo
from penstock.serving.gateway.errors import error_body

MAX_HEAD_BYTES = 65_536


class BoundedHttpProtocol(HttpToolsProtocol):
    """Counts the bytes that arrive between the start of a request and the end of its head."""

    _head_bytes = 0
    _in_head = True

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, "Request Header Fields Too Large", "The request's headers are too large.")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets OpenAI's error object too."""
        self._refuse(400, "Bad Request", msg)

    def _refuse(self, status: int, phrase: str, message: str) -> None:
        body = error_body(ErrorInfo(message=message, status=status, type="invalid_request_error", code="invalid_http"))
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
