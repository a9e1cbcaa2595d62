"""The credential of a request, taken from its raw headers."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_CREDENTIAL_BYTES = 8192
_BEARER = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([!-~]+)")
_VISIBLE = re.compile(rb"[!-~]+")


class MalformedCredentialError(ValueError):
    """The headers hold something that is no credential, or more than one. Carries no text, so that none can leak."""


def credential_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """What stands in `Authorization: Bearer X` or `X-API-Key: X`; both may be there if they agree. None when neither is.

    Raises MalformedCredentialError for anything that two readers could read in two ways: repeated headers, other schemes, two
    different values, bytes outside of visible ASCII, more than MAX_CREDENTIAL_BYTES.
    """
    authorization: bytes | None = None
    api_key: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            if authorization is not None:
                raise MalformedCredentialError
            authorization = value
        elif name == b"x-api-key":
            if api_key is not None:
                raise MalformedCredentialError
            api_key = value
    found = []
    if authorization is not None:
        found.append(_checked(authorization, _BEARER))
    if api_key is not None:
        found.append(_checked(api_key, _VISIBLE))
    if len(found) == 2 and found[0] != found[1]:
        raise MalformedCredentialError
    return found[0].decode("ascii") if found else None


def _checked(value: bytes, pattern: re.Pattern[bytes]) -> bytes:
    if len(value) > MAX_CREDENTIAL_BYTES:
        raise MalformedCredentialError
    match = pattern.fullmatch(value.strip(b" \t"))
    if match is None:
        raise MalformedCredentialError
    return match[match.lastindex or 0]
