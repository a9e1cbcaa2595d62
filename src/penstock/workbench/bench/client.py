"""Asks an OpenAI-compatible server for streams, over kept-alive connections.

`extensions=False` leaves out every field that is not OpenAI's (ignore_eos, min_tokens, continuous_usage_stats), for servers
that refuse unknown fields; outputs may then end early.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from penstock.core.errors import ConfigError
from penstock.workbench.bench.http import Connection, ConnectionClosedError, HttpProtocolError, Response
from penstock.workbench.bench.record import RequestRecord, read_response
from penstock.workbench.bench.workload import BenchRequest

Endpoint = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server under test. `url` with or without the final /v1. Raises ConfigError for a URL that cannot be used."""

    url: str
    model: str
    api_key: str | None = None
    endpoint: Endpoint = "completions"
    extensions: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0
    extra_body: dict[str, Any] = field(default_factory=dict)
    response_cache: bool = False

    def __post_init__(self) -> None:
        _split_url(self.url)


class Client:
    """Sends requests over kept-alive connections, as many at once as are asked for. Use as an async context manager."""

    def __init__(self, target: Target) -> None:
        self.target = target
        secure, self._host, self._port, self._prefix = _split_url(target.url)
        self._tls = ssl.create_default_context() if secure else None
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)

    def encode(self, request: BenchRequest) -> bytes:
        """The request as it goes over the wire; made before the run, so that encoding costs nothing while it is measured."""
        target = self.target
        body: dict[str, Any] = {
            "model": target.model,
            "max_tokens": request.max_tokens,
            "temperature": target.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if target.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if target.extensions:
            body["stream_options"]["continuous_usage_stats"] = True
            body |= {"ignore_eos": True, "min_tokens": request.max_tokens}
        route = "/chat/completions" if target.endpoint == "chat" else "/completions"
        return self._head("POST", route, msgspec.json.encode(body | target.extra_body))

    async def send(
        self, request: BenchRequest, due: float, encoded: bytes | None = None, response: Response | None = None
    ) -> RequestRecord:
        """Send one request that was due at `due` and follow its stream to the end. Never raises for what a server can do wrong.

        `encoded`: what `encode` made of the request before. `response`: the object to fill, for a caller that watches the stream.
        """
        encoded = self.encode(request) if encoded is None else encoded
        response = Response() if response is None else response
        sent = time.perf_counter()
        error = detail = ""
        try:
            async with asyncio.timeout(self.target.timeout_s):
                await self._exchange(encoded, response)
        except TimeoutError:
            error = "timeout"
        except ConnectionClosedError as closed:
            error, detail = "disconnected", str(closed)
        except HttpProtocolError as broken:
            error, detail = "bad_response", str(broken)
        except OSError as refused:
            error, detail = "connect", str(refused)
        finished = time.perf_counter()
        record = RequestRecord(
            index=request.index, due=due, sent=sent, finished=finished, asked_tokens=request.max_tokens
        )
        return read_response(record, response, error, detail)

    async def models(self) -> list[str]:
        """Names the server lists. Raises ConfigError when it cannot be asked."""
        try:
            async with asyncio.timeout(min(self.target.timeout_s, 30.0)):
                response = Response()
                await self._exchange(self._head("GET", "/models", b""), response)
            if response.status != 200:
                raise ConfigError(f"{self.target.url} answers /v1/models with status {response.status}.")
            return [card.id for card in msgspec.json.decode(response.body, type=_ModelList).data]
        except TimeoutError:
            raise ConfigError(f"{self.target.url} does not answer.") from None
        except (OSError, ConnectionClosedError, HttpProtocolError, msgspec.DecodeError) as error:
            raise ConfigError(f"{self.target.url} cannot be asked for its models: {error}") from error

    async def _exchange(self, encoded: bytes, response: Response) -> None:
        """On a kept connection the server may just have closed it; nothing was processed then, so a fresh one is tried."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.usable:
                continue
            try:
                await self._on(connection, encoded, response)
                return
            except ConnectionClosedError as error:
                if error.started:
                    raise
        await self._on(await self._connect(), encoded, response)

    async def _on(self, connection: Connection, encoded: bytes, response: Response) -> None:
        await connection.exchange(encoded, response)
        if connection.usable:
            self._idle.append(connection)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        return connection

    def _head(self, method: str, route: str, body: bytes) -> bytes:
        lines = [
            f"{method} {self._prefix}{route} HTTP/1.1",
            f"Host: {self._host}:{self._port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        if not self.target.response_cache:
            # Deterministic requests would be answered from a gateway's response cache, and nothing would be measured.
            lines.append("Cache-Control: no-store")
        if self.target.api_key:
            lines.append(f"Authorization: Bearer {self.target.api_key}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model]


def _split_url(url: str) -> tuple[bool, str, int, str]:
    """(TLS?, host, port, path prefix ending in /v1)."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a URL: {error}") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"A server's URL looks like http://127.0.0.1:8000, not {url!r}.")
    secure = parts.scheme == "https"
    path = parts.path.rstrip("/")
    return secure, parts.hostname, port or (443 if secure else 80), path if path.endswith("/v1") else path + "/v1"
