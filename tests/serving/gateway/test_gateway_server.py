"""The server process: binding, signals, drain."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from penstock.core.config import ServerConfig
from penstock.core.errors import ConfigError
from penstock.serving.gateway.server import bind_socket, url_of
from penstock.testing.fake_client import Behavior
from penstock.testing.gateway_server import MODEL, GatewayServer

PROGRAM = """
import sys
from penstock.core.config import ServerConfig
from penstock.core.log import configure_logging
from penstock.serving.gateway.app import create_app
from penstock.serving.gateway.server import run_server
from penstock.testing.fake_client import Behavior, FakeClient

configure_logging("info", "text")
config = ServerConfig(port=0, drain_timeout_s=float(sys.argv[1]))
client = FakeClient(Behavior(interval_s=0.01))
run_server(create_app({"m": client}, config), config, lambda url: print(url, flush=True))
print("returned", flush=True)
"""


def test_a_port_in_use_is_one_line_with_the_fix() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} on 127.0.0.1 is in use; .* --port") as caught:
            bind_socket(ServerConfig(port=port))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["no such host", "203.0.113.7", "256.1.1.1"])
def test_an_unusable_host_is_one_line_with_the_fix(host: str) -> None:
    with pytest.raises(ConfigError, match="--host") as caught:
        bind_socket(ServerConfig(host=host, port=0))
    assert "\n" not in str(caught.value)


def test_urls_can_be_typed() -> None:
    with bind_socket(ServerConfig(port=0, host="0.0.0.0")) as sock:  # noqa: S104
        assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def start(drain_timeout_s: float) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(drain_timeout_s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def read_stream(url: str, max_tokens: int, began: threading.Event, result: dict[str, Any]) -> None:
    """Consume one stream; `result` gets its text and, when it fails, its error."""
    result["text"] = ""
    with openai.OpenAI(
        base_url=url + "/v1", api_key="none", max_retries=0, default_headers={"Cache-Control": "no-store"}
    ) as api:
        try:
            for part in api.completions.create(model="m", prompt="abc", max_tokens=max_tokens, stream=True):
                result["text"] += part.choices[0].text
                began.set()
        except openai.APIError as error:
            result["error"] = error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_streams_finish_and_exits_0(number: signal.Signals) -> None:
    process, url = start(drain_timeout_s=20)
    result: dict[str, Any] = {}
    began = threading.Event()
    reader = threading.Thread(target=read_stream, args=(url, 90, began, result))
    reader.start()
    assert began.wait(20)
    process.send_signal(number)
    time.sleep(0.2)
    ready = httpx.get(url + "/health/ready")
    refused = httpx.post(url + "/v1/completions", json={"model": "m", "prompt": "a"})
    output, log = process.communicate(timeout=30)
    reader.join()
    assert (ready.status_code, refused.status_code) == (503, 503)
    assert refused.headers["retry-after"] == "1"
    assert result == {"text": "abc" * 30}
    assert process.returncode == 0, log
    assert output == "returned\n"
    assert "Traceback" not in log


def test_streams_beyond_the_drain_timeout_end_with_an_error() -> None:
    process, url = start(drain_timeout_s=0.3)
    result: dict[str, Any] = {}
    began = threading.Event()
    reader = threading.Thread(target=read_stream, args=(url, 3000, began, result))
    reader.start()
    assert began.wait(20)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    reader.join()
    assert process.returncode == 0, log
    assert result["error"].code == "overloaded"


def test_two_signals_skip_the_waiting() -> None:
    process, url = start(drain_timeout_s=60)
    began = threading.Event()
    reader = threading.Thread(target=read_stream, args=(url, 3000, began, {}))
    reader.start()
    assert began.wait(20)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    reader.join()
    assert time.monotonic() - started < 10


def test_a_stopped_server_returns_at_once_when_idle() -> None:
    with GatewayServer(ServerConfig(port=0, drain_timeout_s=60)) as server:
        server.client.behavior = Behavior()
        httpx.post(server.url + "/v1/completions", json={"model": MODEL, "prompt": "a"})
        started = time.monotonic()
        server.stop()
    assert time.monotonic() - started < 2
