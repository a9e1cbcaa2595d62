"""Errors: OpenAI's object with all four fields, the right exception class, nothing internal; malformed bodies over raw sockets."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from penstock.core.errors import (
    AbortedError,
    ContextLengthError,
    DeadlineExceededError,
    EngineDeadError,
    EngineError,
    NotFoundError,
    OverloadedError,
)
from penstock.testing.gateway_server import MODEL, GatewayServer, error_of

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
GOOD = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()


@pytest.mark.parametrize(
    ("raised", "status", "exception", "code"),
    [
        (ContextLengthError("Too long: 5000 of 4096."), 400, openai.BadRequestError, "context_length_exceeded"),
        (NotFoundError("Gone."), 404, openai.NotFoundError, "not_found"),
        (EngineError("Failed."), 500, openai.InternalServerError, "engine_error"),
        (OverloadedError("Full.", retry_after_s=2.2), 503, openai.InternalServerError, "overloaded"),
        (EngineDeadError("Dead."), 503, openai.InternalServerError, "engine_dead"),
        (DeadlineExceededError("Late."), 504, openai.InternalServerError, "deadline_exceeded"),
        (AbortedError("Stopped."), 503, openai.InternalServerError, "overloaded"),
        (ZeroDivisionError("secret"), 500, openai.InternalServerError, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_engine_errors_raise_the_right_class(
    server: GatewayServer, api: openai.OpenAI, raised: Exception, status: int, exception: Any, code: str, stream: bool
) -> None:
    server.client.behavior.error = raised
    with pytest.raises(exception) as caught:
        api.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert "secret" not in caught.value.message
    retry_after = {OverloadedError: "3", AbortedError: "1"}.get(type(raised))
    assert caught.value.response.headers.get("retry-after") == retry_after


def test_unknown_model(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        api.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-9")


def test_context_length_says_both_numbers(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"needs 5001 tokens.*takes 4096"):
        api.completions.create(model=MODEL, prompt="", max_tokens=5000)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/completions/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/health/live", 405),
        ("GET", "/a\n%0aERROR", 404),
    ],
)
def test_framework_errors_have_the_same_shape(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path.replace("\n", ""))
    assert response.status_code == status
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_an_internal_error_names_the_request_and_nothing_else(server: GatewayServer, http: httpx.Client) -> None:
    server.client.behavior.error = RuntimeError("password=123")
    response = http.post(
        "/v1/completions", content=GOOD, headers={"content-type": "application/json", "x-request-id": "r-7"}
    )
    assert response.status_code == 500
    assert error_of(response)["message"] == "Internal error. If you report it, please give the request id r-7."
    assert response.headers["x-request-id"] == "r-7"


@pytest.mark.parametrize(
    "given",
    ["", "a" * 129, "sp ace", "tab\tx", "ü".encode("latin-1")],
)
def test_unusable_request_ids_are_replaced(http: httpx.Client, given: Any) -> None:
    answered = http.get("/version", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert answered.startswith("req_")
    assert len(answered) == 36


def test_usable_request_ids_are_echoed_once(http: httpx.Client) -> None:
    response = http.get("/version", headers={"X-Request-Id": "a" * 128})
    assert response.headers.get_list("x-request-id") == ["a" * 128]
    twice = http.get("/version", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
    assert twice.headers["x-request-id"].startswith("req_")


BAD_BODIES: list[bytes] = [
    b"",
    b"  ",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"5",
    b"{} {}",
    b"{'a': 1}",
    b'{"a": NaN}',
    b'{"temperature": Infinity}',
    b'{"temperature": 1e999}',
    b'{"model": "\xff"}',
    b'{"model": "\\ud800"}',
    b'{"model": "\\ud800x\\udc00"}',
    b'{"model": "a\x00"}',
    b"\xef\xbb\xbf{}",
    b"\x00",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b'{"n": ' + b"9" * 5000 + b"}",
    GOOD[:-5],
    GOOD + b"}",
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:24]))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/tokenize"])
def test_malformed_bodies_are_400(http: httpx.Client, path: str, body: bytes) -> None:
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_body"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": MODEL, "prompt": "a\0"}, "prompt"),
        ({"model": MODEL, "prompt": ["ok", "a\0"]}, "prompt"),
        ({"model": MODEL, "prompt": "a", "metadata": {"x\0": 1}}, "metadata"),
        ({"model": MODEL, "prompt": "a", "x\0": 1}, None),
    ],
)
def test_nul_is_refused(http: httpx.Client, body: dict[str, Any], param: str | None) -> None:
    response = http.post("/v1/completions", json=body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_a_written_out_escape_is_not_a_nul(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={"model": MODEL, "prompt": "\\u0000"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/jsonx"},
        [("content-type", "application/json"), ("content-type", "application/json")],
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_content_types_that_are_refused(http: httpx.Client, headers: Any) -> None:
    response = http.post("/v1/completions", content=GOOD, headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_body")


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"']
)
def test_content_types_that_pass(http: httpx.Client, content_type: str) -> None:
    assert http.post("/v1/completions", content=GOOD, headers={"content-type": content_type}).status_code == 200


def test_a_body_above_the_limit_is_413(server: GatewayServer, http: httpx.Client, api: openai.OpenAI) -> None:
    limit = server.config.max_body_bytes
    response = http.post("/v1/completions", content=b" " * (limit + 1), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "payload_too_large"
    with pytest.raises(openai.APIStatusError) as caught:
        api.completions.create(model=MODEL, prompt="x" * limit)
    assert caught.value.status_code == 413
    exact = GOOD + b" " * (limit - len(GOOD))
    assert http.post("/v1/completions", content=exact, headers={"content-type": "application/json"}).status_code == 200


def exchange(server: GatewayServer, sent: list[bytes]) -> bytes:
    """Send the pieces over a raw connection and read until the server closes."""
    address = urlsplit(server.url)
    received = b""
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as connection:
        try:
            for piece in sent:
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # The server refused and closed; its answer is still to be read.
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            pass  # Unread input resets the connection after the answer.
    return received


def head(*lines: str) -> bytes:
    return "\r\n".join(
        ["POST /v1/completions HTTP/1.1", "host: localhost", "connection: close", *lines, "", ""]
    ).encode()


def test_a_chunked_body_is_counted_while_it_streams_in(server: GatewayServer) -> None:
    start = head("content-type: application/json", "transfer-encoding: chunked")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = exchange(server, [start, *[chunk] * 64])
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"payload_too_large"' in answer


def test_a_chunked_body_within_the_limit_passes(server: GatewayServer) -> None:
    chunks = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (GOOD[:10], GOOD[10:]))
    answer = exchange(
        server, [head("content-type: application/json", "transfer-encoding: chunked"), chunks + b"0\r\n\r\n"]
    )
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_huge_announcement_is_refused_without_reading(server: GatewayServer) -> None:
    answer = exchange(server, [head("content-type: application/json", "content-length: 99999999999999")])
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        head("content-length: abc"),
        head("content-length: 5", "content-length: 6"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
    ],
)
def test_what_is_not_http_gets_an_error_object(server: GatewayServer, sent: bytes) -> None:
    answer = exchange(server, [sent])
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":{"message"' in answer


def test_endless_headers_are_cut_off(server: GatewayServer) -> None:
    line = b"x-filler: " + b"y" * 1000 + b"\r\n"
    answer = exchange(server, [b"GET /version HTTP/1.1\r\nhost: localhost\r\n", *[line * 10] * 200])
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
    assert httpx.get(server.url + "/version").status_code == 200


def test_the_gateway_imports_no_torch() -> None:
    code = (
        "import sys, penstock.serving.gateway.app, penstock.serving.gateway.server\n"
        "heavy = {'torch', 'transformers', 'prometheus_client', 'zmq', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
