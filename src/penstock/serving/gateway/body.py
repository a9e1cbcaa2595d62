"""Reads and decodes a request body: strict JSON, an object, text that every part of the system can hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from fastapi import Request
from starlette.types import Receive, Scope

from penstock.core.errors import AbortedError, InvalidRequestError

_MAX_TYPE_SHOWN = 64


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object; see `read_body`."""
    return decode_object(await read_body(request.scope, request.receive))


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The body. Raises InvalidRequestError, and AbortedError when the client leaves while sending.

    The size limit is the middleware's. The content type must be JSON: other types are what a foreign web page can send to a server on
    this machine without the browser asking first.
    """
    _check_headers(scope["headers"])
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise AbortedError("The client went away.")
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def decode_object(raw: bytes) -> dict[str, Any]:
    """Decode strict JSON (RFC 8259: no NaN, no lone surrogates, nothing after the value; bounded depth)."""
    try:
        data = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise _invalid(f"The body is not valid JSON: {error}.") from None
    except UnicodeDecodeError:
        raise _invalid("The body is not valid UTF-8.") from None
    except RecursionError:
        raise _invalid("The body is nested too deeply.") from None
    if not isinstance(data, dict):
        raise _invalid("The body must be a JSON object.")
    if b"\\u0000" in raw:
        _refuse_nul(data)
    return data


def _check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    content_types = []
    encoding = b"identity"
    for name, value in headers:
        if name == b"content-type":
            content_types.append(value)
        elif name == b"content-encoding":
            encoding = value.lower()
    if content_types != [b"application/json"]:
        _check_content_type([value.decode("latin-1") for value in content_types])
    if encoding != b"identity":
        shown = encoding[:_MAX_TYPE_SHOWN].decode("latin-1")
        raise _invalid(f"Content-Encoding {shown!r} is not supported; send the body plain.")


def _check_content_type(content_types: list[str]) -> None:
    if len(content_types) > 1:
        raise _invalid("There is more than one Content-Type header.")
    media_type, _, parameters = (content_types[0] if content_types else "").partition(";")
    if media_type.strip().lower() != "application/json":
        raise _invalid("Content-Type must be application/json.")
    charset = parameters.strip().lower().replace('"', "")
    if charset.startswith("charset=") and charset not in ("charset=utf-8", "charset=utf8"):
        raise _invalid("The body must be UTF-8.")


def _refuse_nul(data: dict[str, Any]) -> None:
    """NUL ends text in too many places (C libraries, databases) to let it in. Iterative: the depth is the client's choice."""
    for name, value in data.items():
        stack: list[Any] = [name, value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                if "\0" in item:
                    raise InvalidRequestError(
                        "Text must not contain NUL (\\u0000).", param=name if "\0" not in name else None
                    )
            elif isinstance(item, list):
                stack.extend(item)
            elif isinstance(item, dict):
                stack.extend(item.keys())
                stack.extend(item.values())


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="invalid_body")
