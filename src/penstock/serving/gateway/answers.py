"""Whole answers: a response object as an HTTP response."""

from __future__ import annotations

import msgspec
from starlette.responses import Response


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """A response object as HTTP response."""
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
