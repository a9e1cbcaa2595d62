"""The headers that go with an error."""

from __future__ import annotations

import pytest

from penstock.core.errors import (
    AuthenticationError,
    InvalidRequestError,
    OverloadedError,
    RateLimitError,
    RequestError,
    StoreUnavailableError,
)
from penstock.serving.gateway.errors import retry_headers


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (RateLimitError("", retry_after_s=2.0), {"retry-after": "2", "retry-after-ms": "2000"}),
        (RateLimitError("", retry_after_s=2.0001), {"retry-after": "3", "retry-after-ms": "2001"}),
        (RateLimitError("", retry_after_s=0.25), {"retry-after": "1", "retry-after-ms": "250"}),
        (RateLimitError("", retry_after_s=0), {"retry-after": "1", "retry-after-ms": "1000"}),
        (RateLimitError("", retry_after_s=None), None),
        (OverloadedError("", retry_after_s=1.5), {"retry-after": "2", "retry-after-ms": "1500"}),
        (StoreUnavailableError(""), {"retry-after": "1", "retry-after-ms": "1000"}),
        (AuthenticationError(""), {"www-authenticate": "Bearer"}),
        (InvalidRequestError(""), None),
    ],
)
def test_when_to_come_back(error: RequestError, headers: dict[str, str] | None) -> None:
    found = retry_headers(error)
    assert (found and {name.lower(): value for name, value in found.items()}) == headers
