"""Requests to an ASGI application without a server between, so that a test says every byte of path and headers itself; and a directory
of keys in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.config import ServerConfig
from penstock.core.errors import RequestError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.accounts.interface import KeyEntry
from penstock.serving.gateway.accounts.keys import hash_secret, new_key
from penstock.serving.gateway.context import context_of
from penstock.serving.gateway.identity import Identity, Role
from penstock.serving.gateway.security.build import add_security
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

Headers = list[tuple[bytes, bytes]]
CLIENT = "203.0.113.9"


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error."""
        code: str = self.json()["error"]["code"]
        return code


@dataclass
class Echo:
    """The application behind: answers 200 and remembers the scopes that reached it."""

    scopes: list[Scope] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            return
        if scope["type"] == "http":
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
            )
            await send({"type": "http.response.body", "body": b"{}"})

    @property
    def identity(self) -> Identity:
        """Who asked last."""
        return context_of(self.scopes[-1]).identity


class MemoryDirectory:
    """A KeyDirectory in memory that counts its look-ups."""

    def __init__(self) -> None:
        self.entries: dict[str, KeyEntry] = {}
        self.finds = 0
        self.failure: RequestError | None = None

    def add(
        self, tenant: str = "acme", role: Role = "user", *, usable: bool = True, expires_at: float | None = None
    ) -> str:
        """A new key; returns what its client sends."""
        key = new_key()
        self._keep(key.key_id, key.secret_hash, tenant, role, usable, expires_at)
        return key.token

    def add_secret(self, key_id: str, secret: str, tenant: str = "acme", role: Role = "admin") -> None:
        """A key that an operator brought along."""
        self._keep(key_id, hash_secret(secret), tenant, role, True, None)

    def _keep(
        self, key_id: str, secret_hash: bytes, tenant: str, role: Role, usable: bool, expires_at: float | None
    ) -> None:
        identity = Identity(tenant=tenant, key_id=key_id, method="key", role=role)
        self.entries[key_id] = KeyEntry(
            key_id=key_id, secret_hash=secret_hash, usable=usable, expires_at=expires_at, identity=identity
        )

    async def find(self, key_id: str) -> KeyEntry | None:
        self.finds += 1
        if self.failure is not None:
            raise self.failure
        return self.entries.get(key_id)

    async def any_admin(self) -> bool:
        return any(entry.usable and entry.identity.role == "admin" for entry in self.entries.values())


class Secured:
    """An Echo behind `add_security`, and what it was built from."""

    def __init__(self, *, host: str = "0.0.0.0", app: ASGIApp | None = None, **settings: Any) -> None:  # noqa: S104
        self.echo = Echo()
        self.directory = MemoryDirectory()
        self.recorder = Recorder()
        self.config = GatewayConfig(**settings)
        self.app = add_security(
            app if app is not None else self.echo, self.config, ServerConfig(host=host), self.directory, self.recorder
        )

    async def get(self, path: str, key: str | None = None, **options: Any) -> Answer:
        """GET with a bearer token."""
        return await ask(self.app, path, bearer(key) if key is not None else [], **options)

    def failures(self, reason: str) -> float:
        """Refusals counted for a reason."""
        return self.recorder.value(metrics.AUTH_FAILURES, reason)


def bearer(key: str) -> Headers:
    return [(b"authorization", b"Bearer " + key.encode())]


async def ask(
    app: ASGIApp,
    path: str,
    headers: Headers | None = None,
    *,
    method: str = "GET",
    host: bytes | None = b"localhost:8000",
    client: str | None = CLIENT,
    root_path: str = "",
    kind: str = "http",
    http_version: str = "1.1",
    scheme: str | None = None,
) -> Answer:
    """One request as uvicorn would make it of `path`, which is what stands on the request line."""
    target, _, query = path.partition("?")
    scope: dict[str, Any] = {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": http_version,
        "scheme": scheme or ("ws" if kind == "websocket" else "http"),
        "root_path": root_path,
        "path": root_path + unquote(target),
        "raw_path": (root_path + target).encode(),
        "query_string": query.encode(),
        "headers": [*([(b"host", host)] if host is not None else []), *(headers or [])],
        "client": (client, 50_000) if client is not None else None,
        "server": ("127.0.0.1", 8000),
    }
    if kind == "http":
        scope["method"] = method
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"} if kind == "websocket" else {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if kind == "websocket":
        return Answer(101 if sent[0]["type"] == "websocket.accept" else 403, {}, b"")
    start = sent[0]
    pairs = [(name.decode().lower(), value.decode()) for name, value in start["headers"]]
    return Answer(start["status"], dict(pairs), b"".join(message.get("body", b"") for message in sent[1:]))
