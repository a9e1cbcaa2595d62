"""Which route needs what. Everything that is not named here needs an identity.

Decided on what the router itself matches, the ASGI path, and never on a URL that is put together from headers. A route is open only to
the exact spelling of its path: an escape, a doubled slash or a dot segment that some later part might read differently needs an identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from starlette.types import Scope

from penstock.core.errors import ConfigError

# "open": a credential that comes along is checked and used, but none is needed. "public": nothing is looked at.
Need = Literal["public", "open", "metrics", "admin", "identity"]

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
METRICS_PATH = "/metrics"
ADMIN_PREFIX = "/admin"
# Files of the console: names of letters, digits, dots and dashes that do not begin with a dot.
_CONSOLE_FILE = re.compile(r"/console/(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)*(?:[A-Za-z0-9_-][A-Za-z0-9._-]*)?")
_OPEN_ROUTE = re.compile(r"/[A-Za-z0-9._~/-]*")
_READ_METHODS = frozenset({"GET", "HEAD"})
_MAX_CONSOLE_PATH = 512


@dataclass(frozen=True, slots=True)
class RouteTable:
    """`opened`: paths that the operator opens, for every method."""

    opened: frozenset[str] = frozenset()

    def need_of(self, scope: Scope) -> Need:
        """What a request needs."""
        path, exact = route_path(scope)
        if path == ADMIN_PREFIX or path.startswith(ADMIN_PREFIX + "/"):
            return "admin"
        if exact and scope["type"] == "http":
            if scope["method"] in _READ_METHODS and (path in PUBLIC_PATHS or _is_console_file(path)):
                return "public"
            if path in self.opened:
                return "open"
            if path == METRICS_PATH and scope["method"] in _READ_METHODS:
                return "metrics"
        return "identity"


def parse_open_routes(text: str) -> frozenset[str]:
    """Paths separated by commas. Raises ConfigError."""
    paths = frozenset(filter(None, (part.strip() for part in text.split(","))))
    for path in paths:
        if not _OPEN_ROUTE.fullmatch(path) or "//" in path or "/." in path:
            raise ConfigError(f"--open-routes takes whole paths such as /v1/models, not {path!r}.")
        if path == ADMIN_PREFIX or path.startswith(ADMIN_PREFIX + "/"):
            raise ConfigError(f"--open-routes cannot open {path}: admin routes always need an admin key.")
    return paths


def route_path(scope: Scope) -> tuple[str, bool]:
    """The path that the router matches (without the root path), and whether the client spelled it exactly so."""
    path: str = scope["path"]
    raw = scope.get("raw_path")
    exact = path.isascii() and (raw is None or raw == path.encode("ascii"))
    root = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        path = path[len(root) :]
    return path, exact


def _is_console_file(path: str) -> bool:
    return path.startswith("/console/") and len(path) <= _MAX_CONSOLE_PATH and bool(_CONSOLE_FILE.fullmatch(path))
