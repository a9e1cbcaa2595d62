"""How the server ends, what it listens with, and slow clients of the whole gateway."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from penstock.core.config import ServerConfig
from penstock.core.errors import ConfigError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.server import bind_metrics_socket, check_tls_files
from penstock.telemetry import metrics
from penstock.testing.fake_client import FakeClient
from penstock.testing.gateway_server import MODEL, GatewayServer, error_of

PROGRAM = """
import json, sys
from penstock.core.config import ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.core.log import configure_logging
from penstock.serving.gateway.app import create_app
from penstock.serving.gateway.server import run_server
from penstock.testing.fake_client import Behavior, FakeClient

configure_logging("info", "text")
config = ServerConfig(port=0, drain_timeout_s=20)
settings = GatewayConfig(auth="none", response_cache="off", **json.loads(sys.argv[1]))
app = create_app({"m": FakeClient(Behavior(interval_s=0.01))}, config, settings=settings)
run_server(app, config, lambda url: print(url, flush=True), settings)
print("returned", flush=True)
"""
JSON_HEADERS = "host: 127.0.0.1\r\ncontent-type: application/json\r\n"
Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def begin(**settings: object) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def ended_well(process: subprocess.Popen[str]) -> bool:
    output, log = process.communicate(timeout=30)
    return (process.returncode, output, "Traceback" in log) == (0, "returned\n", False)


def wait_unready(url: str) -> None:
    deadline = time.monotonic() + 20
    while httpx.get(url + "/health/ready").status_code != 503:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_turns_readiness_off_and_lingers(start: Start) -> None:
    process, url = start(drain_linger_s=3)
    process.send_signal(signal.SIGTERM)
    wait_unready(url)
    accepted = httpx.post(url + "/v1/completions", json={"model": "m", "prompt": "a", "max_tokens": 3})
    assert accepted.status_code == 200
    assert httpx.get(url + "/health/live").status_code == 200
    assert ended_well(process)


def test_a_stream_that_began_while_it_lingered_finishes(start: Start) -> None:
    process, url = start(drain_linger_s=1)
    process.send_signal(signal.SIGTERM)
    wait_unready(url)
    body = {"model": "m", "prompt": "a", "max_tokens": 200, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as stream:
        assert list(stream.iter_lines())[-2] == "data: [DONE]"
    assert ended_well(process)


@pytest.mark.parametrize(
    "numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]]
)
def test_sigint_and_second_signals_do_not_linger(numbers: list[signal.Signals], start: Start) -> None:
    process, url = start(drain_linger_s=60)
    process.send_signal(numbers[0])
    for number in numbers[1:]:
        wait_unready(url)
        process.send_signal(number)
    assert ended_well(process)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate of 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return str(certificate), str(key)


def test_tls_files(certificate: tuple[str, str]) -> None:
    settings = GatewayConfig(
        auth="none", response_cache="off", ssl_certfile=certificate[0], ssl_keyfile=certificate[1], read_timeout_s=1.0
    )
    check_tls_files(settings)
    with GatewayServer(settings=settings) as server:
        assert server.url.startswith("https://")
        trust = ssl.create_default_context(cafile=certificate[0])
        with httpx.Client(base_url=server.url, verify=trust, timeout=30) as client:
            answer = client.post("/v1/completions", json={"model": MODEL, "prompt": "abc", "max_tokens": 6})
            assert answer.json()["choices"][0]["text"] == "abcabc"
        # A client that begins TLS and says no more is closed by the head's time.
        host, port = server.url.removeprefix("https://").split(":")
        with trust.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as quiet:
            quiet.settimeout(20)
            assert quiet.recv(100) == b""


def test_tls_files_that_cannot_be_used_say_which(certificate: tuple[str, str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("not a key")
    for key, reason in ((str(tmp_path / "none.pem"), "--ssl-keyfile"), (str(wrong), "cannot be used together")):
        with pytest.raises(ConfigError, match=reason) as caught:
            check_tls_files(GatewayConfig(ssl_certfile=certificate[0], ssl_keyfile=key))
        assert "\n" not in str(caught.value)


def test_the_metrics_port_is_taken_before_the_start() -> None:
    assert bind_metrics_socket(GatewayConfig()) is None
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} on 127.0.0.1 is in use; .* --metrics-port"):
            bind_metrics_socket(GatewayConfig(metrics_port=port))


def test_a_prefix_that_the_proxy_strips() -> None:
    settings = GatewayConfig(auth="none", response_cache="off", root_path="/llm")
    with GatewayServer(settings=settings) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.get("/v1/models").status_code == 200
        answer = client.post("/v1/completions", json={"model": MODEL, "prompt": "abc", "max_tokens": 3})
        assert answer.json()["choices"][0]["text"] == "abc"


@pytest.fixture
def impatient() -> Iterator[GatewayServer]:
    settings = GatewayConfig(auth="none", response_cache="off", read_timeout_s=0.5, max_connections=20)
    with GatewayServer(ServerConfig(port=0, drain_timeout_s=1, sse_ping_s=0.1), settings=settings) as server:
        yield server


def connect(server: GatewayServer, receive_buffer: int = 0) -> socket.socket:
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(30)
    host, port = server.url.removeprefix("http://").split(":")
    sock.connect((host, int(port)))
    return sock


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_body_that_stops_is_408_and_leaves_nothing_behind(impatient: GatewayServer) -> None:
    with connect(impatient) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\n{JSON_HEADERS}content-length: 100\r\n\r\n"
        sock.sendall(head.encode() + b'{"model":')
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answer
    until(lambda: impatient.recorder.value(metrics.HTTP_IN_FLIGHT) == 0)
    assert impatient.client.requests == []


def test_a_body_without_end_is_413_and_then_closed(impatient: GatewayServer) -> None:
    with connect(impatient) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        sent = 0
        with contextlib.suppress(OSError):  # reset or broken pipe
            while sent < 2**30:
                sock.sendall(chunk)
                sent += len(chunk)
    assert sent < 2**30, "the server took a GiB and did not hang up"
    until(lambda: impatient.recorder.value(metrics.HTTP_IN_FLIGHT) == 0)


def test_a_stream_that_nobody_reads_is_aborted(impatient: GatewayServer) -> None:
    tokens = 200_000
    impatient.client.max_model_len = 2 * tokens
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": tokens, "logprobs": 5, "stream": True}).encode()
    with connect(impatient, receive_buffer=4096) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\n{JSON_HEADERS}content-length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        until(lambda: impatient.client.closed_early)
        until(lambda: impatient.recorder.value(metrics.HTTP_IN_FLIGHT) == 0)
    assert impatient.recorder.value(metrics.REQUESTS, MODEL, "aborted") == 1


def test_a_flood_of_connections_is_refused_and_the_server_goes_on(impatient: GatewayServer) -> None:
    idle = [connect(impatient) for _ in range(20)]
    try:
        with httpx.Client(base_url=impatient.url) as client:
            refused = client.get("/health/live")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert refused.headers["retry-after"] == "1"
        assert impatient.recorder.value(metrics.REFUSED, "connections") == 1
        assert [read_all(sock) for sock in idle] == [b""] * 20  # they never asked, so they are closed
    finally:
        for sock in idle:
            sock.close()
    until(lambda: httpx.get(impatient.url + "/health/live").status_code == 200)


def test_a_silent_client_costs_others_nothing() -> None:
    settings = GatewayConfig(auth="none", response_cache="off", read_timeout_s=30.0)
    with GatewayServer(client=FakeClient(), settings=settings) as server, connect(server) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-le")
        assert httpx.get(server.url + "/health/ready").status_code == 200
        missing = httpx.post(server.url + "/v1/completions", json={"model": "none", "prompt": "a"})
        assert error_of(missing)["code"] == "model_not_found"
