"""Keys behind a URL: fetched when needed, seldom, within bounds, from nowhere else; and kept while the URL is away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from penstock.core.errors import ConfigError, StoreUnavailableError
from penstock.serving.gateway.security.jwks import MAX_JWKS_BYTES, MIN_REFRESH_S, Jwks, JwksError, fetcher

URL = "https://id.example/.well-known/jwks.json"
KEYS = {kid: ec.generate_private_key(ec.SECP256R1()) for kid in ("one", "two")}


def document(*kids: str) -> bytes:
    entries = [{**ECAlgorithm.to_jwk(KEYS[kid].public_key(), as_dict=True), "kid": kid} for kid in kids]
    return json.dumps({"keys": entries}).encode()


class Source:
    """An identity provider that can be told what to answer."""

    def __init__(self, *kids: str) -> None:
        self.answer: Callable[[], bytes] = lambda: document(*kids)
        self.fetches = 0
        self.now = 0.0
        self.hold: asyncio.Event | None = None
        self.jwks = Jwks(self._fetch, "ES256", clock=lambda: self.now)

    async def _fetch(self) -> bytes:
        self.fetches += 1
        if self.hold is not None:
            await self.hold.wait()
        return self.answer()

    def fail(self) -> None:
        def away() -> bytes:
            raise OSError("connection refused")

        self.answer = away


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_keys_are_fetched_once_for_many_that_ask_at_once() -> None:
    source = Source("one")
    source.hold = asyncio.Event()
    asking = [asyncio.create_task(source.jwks.find("one")) for _ in range(50)]
    await settle()
    asking[0].cancel()
    source.hold.set()
    found = await asyncio.gather(*asking[1:])
    assert source.fetches == 1
    assert all(key is not None for key in found)


async def test_an_unknown_kid_fetches_at_most_every_thirty_seconds() -> None:
    source = Source("one")
    assert await source.jwks.find("one") is not None
    for _ in range(1000):
        assert await source.jwks.find("two") is None
    assert source.fetches == 1
    source.answer = lambda: document("one", "two")
    source.now += MIN_REFRESH_S - 1
    assert await source.jwks.find("two") is None
    source.now += 1
    assert await source.jwks.find("two") is not None
    for number in range(100):
        assert await source.jwks.find(f"made up {number}") is None
    assert source.fetches == 2


async def test_known_keys_work_while_the_source_is_away(caplog: pytest.LogCaptureFixture) -> None:
    source = Source("one")
    assert await source.jwks.find("one") is not None
    source.fail()
    for _ in range(20):
        source.now += 400
        assert await source.jwks.find("one") is not None
        await settle()
    assert source.fetches == 21
    away = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(away) == 1
    # Back with a new key, and the old one taken out: both take effect.
    source.answer = lambda: document("two")
    source.now += MIN_REFRESH_S
    assert await source.jwks.find("two") is not None
    assert await source.jwks.find("one") is None
    assert "can be fetched again" in caplog.text


async def test_old_keys_are_refreshed_behind_the_requests() -> None:
    source = Source("one")
    assert await source.jwks.find("one") is not None
    source.now += 301
    source.hold = asyncio.Event()
    # Answers although the fetch hangs.
    assert await source.jwks.find("one") is not None
    assert await source.jwks.find("one") is not None
    await settle()
    assert source.fetches == 2
    source.answer = lambda: document("two")
    source.hold.set()
    await settle()
    assert await source.jwks.find("one") is None
    assert await source.jwks.find("two") is not None
    assert source.fetches == 2


async def test_without_any_keys_it_is_an_outage_and_not_a_wrong_token() -> None:
    source = Source("one")
    source.fail()
    for _ in range(100):
        with pytest.raises(StoreUnavailableError):
            await source.jwks.find("one")
    assert source.fetches == 1
    source.answer = lambda: document("one")
    source.now += 1
    assert await source.jwks.find("one") is not None


@pytest.mark.parametrize(
    "answer", [b"", b"{", b"[]", b'{"keys": {}}', b'{"keys": [1]}', b"\xff", b'{"keys": null}', b"[" * 9999]
)
async def test_nonsense_does_not_replace_good_keys(answer: bytes) -> None:
    source = Source("one")
    assert await source.jwks.find("one") is not None
    source.answer = lambda: answer
    source.now += 1000
    assert await source.jwks.find("two") is None
    assert await source.jwks.find("one") is not None


async def test_too_many_keys_are_refused() -> None:
    source = Source()
    entry = json.loads(document("one"))["keys"][0]
    source.answer = lambda: json.dumps({"keys": [{**entry, "kid": str(number)} for number in range(65)]}).encode()
    with pytest.raises(JwksError, match="at most 64"):
        await source.jwks.load()


async def test_which_key_a_token_may_leave_unnamed() -> None:
    single = Source("one")
    assert await single.jwks.find(None) is not None
    assert await single.jwks.find("other") is None
    several = Source("one", "two")
    assert await several.jwks.find(None) is None
    unnamed = Source()
    entry = {key: value for key, value in json.loads(document("one"))["keys"][0].items() if key != "kid"}
    unnamed.answer = lambda: json.dumps({"keys": [entry]}).encode()
    assert await unnamed.jwks.find("whatever") is not None


class Chunks(httpx.AsyncByteStream):
    """A body without end."""

    async def __aiter__(self) -> Any:
        while True:
            yield b"x" * 65_536


def whole(content: bytes) -> httpx.Response:
    """A body that the client has not read yet, as over a network."""
    return httpx.Response(200, stream=httpx.ByteStream(content))


def over(handler: Callable[[httpx.Request], httpx.Response], url: str = URL) -> Callable[[], Any]:
    return fetcher(url, httpx.MockTransport(handler))


async def test_a_document_over_https() -> None:
    requests = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return whole(document("one"))

    assert await Jwks(over(handler), "ES256").find("one") is not None
    assert [(str(request.url), request.headers["accept-encoding"]) for request in requests] == [(URL, "identity")]


@pytest.mark.parametrize(
    "response",
    [
        lambda: httpx.Response(404),
        lambda: httpx.Response(500, content=document("one")),
        lambda: whole(b"x" * (MAX_JWKS_BYTES + 1)),
        lambda: httpx.Response(200, stream=Chunks()),
        lambda: httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Chunks()),
        lambda: httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"small")),
        lambda: httpx.Response(302, headers={"location": "https://evil.example/jwks.json"}),
        lambda: httpx.Response(302, headers={"location": "http://id.example/jwks.json"}),
        lambda: httpx.Response(302, headers={"location": "https://id.example:8443/jwks.json"}),
        lambda: httpx.Response(302, headers={"location": "//169.254.169.254/latest"}),
        lambda: httpx.Response(307, headers={"location": "file:///etc/passwd"}),
        lambda: httpx.Response(301, headers={"location": "/again"}),
    ],
)
async def test_answers_that_are_not_believed(response: Callable[[], httpx.Response]) -> None:
    hosts = set()

    def handler(request: httpx.Request) -> httpx.Response:
        hosts.add((request.url.scheme, request.url.netloc))
        return response()

    with pytest.raises(JwksError):
        await over(handler)()
    assert hosts == {("https", b"id.example")}


async def test_a_redirect_on_the_same_host_is_followed() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/new":
            return whole(document("one"))
        return httpx.Response(302, headers={"location": "/new"})

    assert await over(handler)() == document("one")


@pytest.mark.parametrize(
    "url", ["http://id.example/jwks", "ftp://id.example/jwks", "file:///etc/jwks", "http://localhost.evil.example/"]
)
def test_only_https_but_for_this_machine(url: str) -> None:
    with pytest.raises(ConfigError, match="https"):
        fetcher(url)
    for own in ("http://127.0.0.1:1/jwks", "http://[::1]:1/jwks", "http://localhost:1/jwks"):
        fetcher(own)


async def test_over_a_real_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = document("one")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        jwks = Jwks(fetcher(f"http://127.0.0.1:{port}/jwks.json"), "ES256")
        assert await jwks.find("one") is not None
