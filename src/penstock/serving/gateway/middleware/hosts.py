"""Which Host and Origin a request may carry.

A page of the web can point its own name at 127.0.0.1 (DNS rebinding) or let the visitor's browser post to localhost (CSRF). Where there
is no key to stop it, the Host must be a name of this machine and the Origin the server's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import InvalidRequestError, PermissionDeniedError, RequestError
from penstock.serving.gateway.errors import render_request_error
from penstock.serving.gateway.middleware.denial import deny_websocket
from penstock.serving.gateway.security.addresses import is_loopback

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z._-]{1,253})(?::([0-9]{1,5}))?")
_SAFE_METHODS = frozenset({"GET", "HEAD"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class HostRules:
    """`allowed`: names without port, lower case; "*.example.com" stands for every name below, "*" for any. `loopback`: names of this
    machine pass too. With neither, every Host passes. `same_origin`: requests that a browser sends for another site's page are
    refused, unless the site is one of `origins`."""

    allowed: frozenset[str] = frozenset()
    loopback: bool = False
    same_origin: bool = False
    origins: frozenset[str] = frozenset()

    @property
    def restricted(self) -> bool:
        """Whether there is a rule about the Host."""
        return bool(self.allowed) or self.loopback

    def host_passes(self, name: str) -> bool:
        """Whether a Host of this name, port cut off, may be served."""
        if self.loopback and _is_local_name(name):
            return True
        if name in self.allowed or "*" in self.allowed:
            return True
        return any(rule.startswith("*.") and name.endswith(rule[1:]) for rule in self.allowed)


class HostsMiddleware:
    """Refuses with 400 what has no Host or several, with 403 what has the wrong one."""

    def __init__(self, app: ASGIApp, rules: HostRules) -> None:
        self.app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await render_request_error(scope, receive, send, refusal)
        else:
            await deny_websocket(receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        hosts = []
        origins = []
        for name, value in scope["headers"]:
            if name == b"host":
                hosts.append(value)
            elif name == b"origin":
                origins.append(value)
        if not hosts and not self._rules.restricted and scope.get("http_version") == "1.0":
            # Health checks of some load balancers; HTTP/1.0 knows no Host.
            return None
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            return InvalidRequestError("The request must have exactly one valid Host header.", code="invalid_host")
        name = match[1].decode("ascii").lower().rstrip(".")
        if self._rules.restricted and not self._rules.host_passes(name):
            return PermissionDeniedError(
                "This Host is not served. The operator allows more of them with --allowed-hosts.",
                code="host_not_allowed",
            )
        if self._rules.same_origin and origins and _changes_something(scope):
            port = int(match[2]) if match[2] else None
            if len(origins) != 1 or not self._origin_passes(origins[0], name, port):
                return PermissionDeniedError(
                    "Pages of other origins may not send this. The operator allows more of them with --cors-origins.",
                    code="origin_not_allowed",
                )
        return None

    def _origin_passes(self, raw: bytes, host: str, port: int | None) -> bool:
        """Whether a page of this origin may ask a server at this host and port (None: the default one of the page's scheme)."""
        origin = raw.decode("latin-1")
        if origin in self._rules.origins or "*" in self._rules.origins:
            return True
        try:
            parts = urlsplit(origin)
            name, page_port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            return False
        default = _DEFAULT_PORTS.get(parts.scheme)
        same_port = (default if page_port is None else page_port) == (default if port is None else port)
        return default is not None and name == host.strip("[]") and same_port


def _changes_something(scope: Scope) -> bool:
    """A websocket begins with a GET, but what follows is no reading of a page, and browsers open it across origins."""
    return scope["type"] == "websocket" or scope["method"] not in _SAFE_METHODS


def _is_local_name(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name.strip("[]"))
