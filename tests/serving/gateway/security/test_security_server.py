"""Security in the whole application behind a real HTTP server: every route it has, and bytes on the wire that no client library sends."""

from __future__ import annotations

import http.client
import logging
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from penstock.core.config import ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.services import Services, build_services
from penstock.telemetry.recorder import Recorder
from penstock.testing.gateway_server import MODEL, GatewayServer, error_of
from tests.serving.gateway.security.asgi_client import MemoryDirectory

PUBLIC = {"/health", "/health/live", "/health/ready"}
OK_OR_MORE = {200, 400, 404, 405}


class KeyedServer(GatewayServer):
    """A server that asks for keys of a directory in memory."""

    def __init__(self, config: ServerConfig | None = None) -> None:
        settings = GatewayConfig(auth="keys", response_cache="off")
        self.directory = MemoryDirectory()
        self.user, self.admin = self.directory.add("acme"), self.directory.add("ops", "admin")

        def services(recorder: Recorder) -> Services:
            built = build_services(settings, recorder, "1.2.3")
            built.keys = self.directory
            return built

        super().__init__(config, settings=settings, services=services)


@pytest.fixture(scope="module")
def keyed() -> Iterator[KeyedServer]:
    server = KeyedServer()
    with server:
        yield server


def raw(server: GatewayServer, data: bytes) -> bytes:
    """What comes back for bytes on the wire."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65_536):
            received += chunk
    return received


def test_every_route_without_a_key_is_401(keyed: KeyedServer) -> None:
    routes = {route.path for route in keyed.app.routes if isinstance(route, APIRoute)} | {
        "/openapi.json",
        "/admin/keys",
        "/nowhere",
    }
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/tokenize", "/metrics", "/version"} <= routes
    connection = http.client.HTTPConnection(urlsplit(keyed.url).netloc, timeout=10)
    for route in sorted(routes - PUBLIC):
        path = route.replace("{model:path}", MODEL)
        spellings = {
            path,
            path + "/",
            "/" + path,
            path.upper(),
            path[0] + path[1:].replace("/", "%2f"),
            "/health/.." + path,
            "/health%2f.." + path,
        }
        for spelling in spellings:
            for method in ("GET", "POST", "PATCH", "DELETE", "OPTIONS"):
                # Not httpx, which would tidy the path up.
                connection.request(method, spelling, body=b'{"prompt": "a"}')
                response = connection.getresponse()
                assert response.status == 401, (method, spelling)
                assert b'"invalid_api_key"' in response.read()
        connection.request("GET", path, headers={"X-API-Key": keyed.admin})
        response = connection.getresponse()
        response.read()
        assert response.status in OK_OR_MORE
    connection.close()
    assert {httpx.get(keyed.url + path).status_code for path in PUBLIC} == {200}
    assert keyed.client.requests == []


def test_the_official_client_and_its_errors(keyed: KeyedServer) -> None:
    with openai.OpenAI(base_url=keyed.url + "/v1", api_key=keyed.user, max_retries=0) as api:
        assert api.completions.create(model=MODEL, prompt="ab", max_tokens=2).choices
    assert keyed.client.requests[-1].tenant == "acme"
    keyed.client.requests.clear()
    with (
        openai.OpenAI(base_url=keyed.url + "/v1", api_key=keyed.user + "x", max_retries=0) as api,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        api.models.list()
    assert caught.value.response.headers["www-authenticate"] == "Bearer"


def test_bytes_that_try_to_pass_by(keyed: KeyedServer) -> None:
    close = b"connection: close\r\n\r\n"
    key = keyed.user.encode()
    cases = [
        (b"GET http://localhost/v1/models HTTP/1.1\r\nhost: localhost\r\n" + close, b"401"),
        (b"GET http://localhost/health HTTP/1.1\r\nhost: localhost\r\n" + close, b"200"),
        (b"GET /v1/models HTTP/1.1\r\nhost: localhost/health\r\n" + close, b"400"),
        (b"GET /v1/models HTTP/1.1\r\n" + close, b"400"),
        (b"GET /v1/models HTTP/1.1\r\nhost: a\r\nhost: b\r\nauthorization: Bearer " + key + b"\r\n" + close, b"400"),
        (b"GET /v1/models HTTP/1.0\r\nauthorization: Bearer " + key + b"\r\n\r\n", b"200"),
        (b"GET /v1/models?x=/health HTTP/1.1\r\nhost: a\r\n" + close, b"401"),
        (b"GET /health?x HTTP/1.1\r\nhost: a\r\n" + close, b"200"),
        (b"GET /health/../v1/models HTTP/1.1\r\nhost: a\r\n" + close, b"401"),
        (
            b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer " + key + b"\r\nAuthorization: x\r\n" + close,
            b"401",
        ),
        (b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer \xff\xfe\r\n" + close, b"401"),
        (b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-api-key: " + b"a" * 20_000 + b"\r\n" + close, b"401"),
        (b"GET /v1/models HTTP/1.1\r\nhost: a\r\nX-Api-Key:   " + key + b"  \r\n" + close, b"200"),
        (b"OPTIONS * HTTP/1.1\r\nhost: a\r\n" + close, b"401"),
        (b"GET /v1/realtime HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n" + close, b"401"),
    ]
    for data, status in cases:
        assert raw(keyed, data).split(b" ")[1] == status, data[:80]


def test_requests_behind_each_other_on_one_connection_are_told_apart(keyed: KeyedServer) -> None:
    """An identity never outlives its request."""
    good = b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer " + keyed.user.encode() + b"\r\n"
    bad = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n"
    received = raw(keyed, good + b"\r\n" + bad + b"\r\n" + good + b"\r\n" + bad + b"connection: close\r\n\r\n")
    assert [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]] == [b"200", b"401", b"200", b"401"]


def test_a_refused_body_is_not_read(keyed: KeyedServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n"
    assert raw(keyed, head).startswith(b"HTTP/1.1 401")


def test_keys_do_not_reach_the_log_of_a_server(keyed: KeyedServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = keyed.user[:-1] + ("A" if keyed.user[-1] != "A" else "B")
    said = ""
    with httpx.Client(base_url=keyed.url) as client:
        for key in (keyed.user, wrong):
            for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}, {"Authorization": key}):
                said += client.get("/v1/models", headers=headers).text
    ours = [record for record in caplog.records if record.name.startswith(("penstock", "uvicorn"))]
    assert any(record.name == "penstock.access" for record in ours)
    said += repr([record.__dict__ for record in ours])
    assert keyed.user[21:-1] not in said
    assert wrong[21:-1] not in said


def test_without_authentication_only_this_machine_names_it(server: GatewayServer) -> None:
    port = urlsplit(server.url).port
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Host": f"localhost:{port}"}).status_code == 200
        refused = client.get("/v1/models", headers={"Host": f"rebound.example:{port}"})
        assert (refused.status_code, error_of(refused)["code"]) == (403, "host_not_allowed")
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        refused = client.post("/v1/completions", json=body, headers={"Origin": "https://evil.example"})
        assert (refused.status_code, error_of(refused)["code"]) == (403, "origin_not_allowed")
        assert client.post("/v1/completions", json=body, headers={"Origin": server.url}).status_code == 200
        assert client.get("/admin/keys").status_code == 404
