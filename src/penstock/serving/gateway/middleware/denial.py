"""Refusing a websocket, which has no status of its own before it is accepted."""

from __future__ import annotations

from starlette.types import Receive, Send

# RFC 6455: policy violation.
_POLICY_VIOLATION = 1008


async def deny_websocket(receive: Receive, send: Send) -> None:
    """Close before accepting; servers answer the handshake with 403."""
    await receive()
    await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": ""})
