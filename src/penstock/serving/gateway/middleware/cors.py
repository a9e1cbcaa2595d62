"""CORS, off unless the operator names origins."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_REQUEST_HEADERS = (
    "Authorization",
    "X-API-Key",
    "Content-Type",
    "Cache-Control",
    "X-Request-Id",
    "X-Request-Timeout",
    # What OpenAI's client for JavaScript sends about itself.
    "OpenAI-Organization",
    "OpenAI-Project",
    "User-Agent",
    "X-Stainless-Arch",
    "X-Stainless-Helper-Method",
    "X-Stainless-Lang",
    "X-Stainless-OS",
    "X-Stainless-Package-Version",
    "X-Stainless-Poll-Helper",
    "X-Stainless-Custom-Poll-Interval",
    "X-Stainless-Retry-Count",
    "X-Stainless-Runtime",
    "X-Stainless-Runtime-Version",
    "X-Stainless-Timeout",
)
_RESPONSE_HEADERS = (
    "X-Request-Id",
    "X-Penstock-Cache",
    "Retry-After",
    "Retry-After-Ms",
    *(f"X-RateLimit-{part}-{kind}" for kind in ("Requests", "Tokens") for part in ("Limit", "Remaining", "Reset")),
)


def add_cors(app: ASGIApp, origins: frozenset[str]) -> ASGIApp:
    """`app` with answers that pages of `origins` ("*": any) may read. Cookies are never allowed: credentials travel in headers."""
    return CORSMiddleware(
        app,
        allow_origins=sorted(origins),
        allow_methods=_METHODS,
        allow_headers=_REQUEST_HEADERS,
        expose_headers=_RESPONSE_HEADERS,
        allow_credentials=False,
    )
