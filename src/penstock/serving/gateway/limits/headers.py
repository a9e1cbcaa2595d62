"""The state of the limits as OpenAI's response headers: x-ratelimit-{limit,remaining,reset}-{requests,tokens}."""

from __future__ import annotations

import math

from penstock.serving.gateway.limits.interface import Window


def limit_headers(requests: Window | None, tokens: Window | None) -> dict[bytes, bytes]:
    """Three headers for each limit that there is."""
    headers: dict[bytes, bytes] = {}
    if requests is not None:
        headers[b"x-ratelimit-limit-requests"] = b"%d" % requests.limit
        headers[b"x-ratelimit-remaining-requests"] = b"%d" % requests.remaining
        headers[b"x-ratelimit-reset-requests"] = format_duration(requests.reset_s)
    if tokens is not None:
        headers[b"x-ratelimit-limit-tokens"] = b"%d" % tokens.limit
        headers[b"x-ratelimit-remaining-tokens"] = b"%d" % tokens.remaining
        headers[b"x-ratelimit-reset-tokens"] = format_duration(tokens.reset_s)
    return headers


def format_duration(seconds: float) -> bytes:
    """A time in OpenAI's notation, rounded up to milliseconds: 250ms, 1s, 7.66s, 6m0s."""
    # Seconds that went through floating point may be a hair above their millisecond.
    milliseconds = max(0, math.ceil(seconds * 1000 - 1e-6))
    if 0 < milliseconds < 1000:
        return b"%dms" % milliseconds
    minutes, rest = divmod(milliseconds, 60_000)
    whole, fraction = divmod(rest, 1000)
    text = f"{whole}.{fraction:03d}".rstrip("0") if fraction else str(whole)
    return (f"{minutes}m{text}s" if minutes else f"{text}s").encode()
