"""X-Forwarded-For and X-Forwarded-Proto, believed from the operator's proxies only.

As uvicorn's own middleware, with three differences: a network that cannot be parsed is an error at start, "*" is not taken (it would
believe the leftmost address, which every client can write), and what is no address never becomes the client's.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.serving.gateway.security.addresses import Address, Network, parse_address

_SCHEMES = {"http": {b"http": "http", b"https": "https"}, "websocket": {b"http": "ws", b"https": "wss"}}
# Hops of a chain that are looked at, from the right.
_MAX_HOPS = 32


class ForwardedMiddleware:
    """Changes the scope's `client` and `scheme` in place, so that whoever wraps this middleware (the access log) sees them too."""

    def __init__(self, app: ASGIApp, trusted: tuple[Network, ...]) -> None:
        self.app = app
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        schemes = _SCHEMES.get(scope["type"])
        if schemes is not None and scope.get("client"):
            peer = parse_address(scope["client"][0])
            if peer is not None and self._trusts(peer):
                self._apply(scope, schemes)
        await self.app(scope, receive, send)

    def _apply(self, scope: Scope, schemes: dict[bytes, str]) -> None:
        protocols = [value.strip().lower() for name, value in scope["headers"] if name == b"x-forwarded-proto"]
        if len(protocols) == 1 and protocols[0] in schemes:
            scope["scheme"] = schemes[protocols[0]]
        client = self._client(value for name, value in scope["headers"] if name == b"x-forwarded-for")
        if client is not None:
            scope["client"] = (str(client), 0)

    def _client(self, values: Iterable[bytes]) -> Address | None:
        """The rightmost address that is not a proxy of ours: what stands left of it is the client's own claim. When all are
        proxies, the leftmost: the request comes from one of them."""
        hops = b",".join(values).rsplit(b",", _MAX_HOPS)[-_MAX_HOPS:]
        client = None
        for hop in reversed(hops):
            address = _address_of(hop.strip())
            if address is None:
                break
            client = address
            if not self._trusts(address):
                break
        return client

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _address_of(hop: bytes) -> Address | None:
    """An address with or without a port: 192.0.2.1, 192.0.2.1:80, 2001:db8::1, [2001:db8::1]:80."""
    text = hop.decode("latin-1")
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return parse_address(text)
