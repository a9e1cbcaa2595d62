"""One test per class of attack that servers of this kind were found open to, against a server with authentication.

Where a class has tests of its own elsewhere, they are named here: timing of keys and alg confusion (security/), SQL in ids and names
(accounts/), poisoned cache values (cache/), endless bodies and heads (test_slow_clients), sandboxed templates
(frontend/test_chat_template).
"""

from __future__ import annotations

import ast
import gzip
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.core.config import ServerConfig
from penstock.core.errors import EngineError
from penstock.core.gateway_config import GatewayConfig
from penstock.core.log import TextFormatter
from penstock.serving.gateway.services import Services, build_services
from penstock.telemetry.recorder import Recorder
from penstock.testing.accounts import FakeKeys
from penstock.testing.fake_client import Behavior
from penstock.testing.gateway_server import MODEL, GatewayServer, error_of

SOURCE = Path(__file__).resolve().parents[3] / "src" / "penstock"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEYS = FakeKeys()


def services(recorder: Recorder) -> Services:
    made = build_services(GatewayConfig(auth="keys"), recorder, "1")
    made.keys = KEYS
    return made


@pytest.fixture(scope="module")
def server() -> Iterator[GatewayServer]:
    config = ServerConfig(port=0, drain_timeout_s=1, max_body_bytes=100_000)
    with GatewayServer(config, settings=GatewayConfig(auth="keys"), services=services) as running:
        yield running


@pytest.fixture
def http(server: GatewayServer) -> Iterator[httpx.Client]:
    server.client.behavior = Behavior()
    headers = {"Authorization": f"Bearer {KEYS.add('tenant')}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=20) as client:
        yield client


def completion(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "abc", "max_tokens": 2, **more}


def conversation(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "abc"}], "max_tokens": 2, **more}


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_deserialisation_nothing_can_make_objects_of_bytes() -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "yaml"}
    for path in SOURCE.rglob("*.py"):
        assert not forbidden & {name.partition(".")[0] for name in imports_of(path)}, path
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not {"eval", "exec"} & calls, path


def test_remote_code_no_path_switches_it_on() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


@pytest.mark.parametrize("field", ["chat_template", "chat_template_kwargs", "template", "documents", "tool_server"])
def test_template_injection_no_field_reaches_the_template(http: httpx.Client, field: str) -> None:
    answer = http.post(CHAT, json=conversation(**{field: {"x": "{{ cycler.__init__.__globals__ }}"}}))
    assert (answer.status_code, error_of(answer)["param"]) == (400, field)


def test_template_injection_a_message_is_text(http: httpx.Client, server: GatewayServer) -> None:
    server.client.requests.clear()
    attack = "{{ ''.__class__.__mro__ }}{% for x in range(10**9) %}{% endfor %}"
    assert http.post(CHAT, json=conversation(messages=[{"role": "user", "content": attack}])).status_code == 200
    (request,) = server.client.requests
    assert request.prompt.messages[0]["content"] == attack  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 10**9),
        ("n", 2**70),
        ("best_of", 10**6),
        ("logprobs", 10**6),
        ("prompt_logprobs", 10**6),
        ("max_tokens", 2**63),
        ("min_tokens", 2**63),
        ("top_k", 2**40),
        ("seed", 2**64),
        ("stop", ["x"] * 10_000),
        ("stop", ["x" * 50_000]),
        ("stop_token_ids", list(range(5_000))),
        ("logit_bias", {str(token): 1 for token in range(5_000)}),
        ("prompt", ["x"] * 5_000),
        ("temperature", 1e308),
        ("timeout", -1),
    ],
)
def test_huge_numbers_are_refused_before_anything_is_made(http: httpx.Client, field: str, value: Any) -> None:
    answer = http.post(COMPLETIONS, json=completion(**{field: value}))
    assert answer.status_code == 400
    assert (error_of(answer)["param"] or "").startswith(field)


def test_oversized_bodies(http: httpx.Client) -> None:
    assert http.post(COMPLETIONS, json=completion(prompt="x" * 200_000)).status_code == 413
    bomb = gzip.compress(json.dumps(completion(prompt="x" * 10_000_000)).encode())
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert http.post(COMPLETIONS, content=bomb, headers=packed).status_code == 400
    nested = b'{"model": ' + b"[" * 40_000 + b"]" * 40_000 + b"}"
    assert http.post(COMPLETIONS, content=nested, headers={"Content-Type": "application/json"}).status_code == 400


def test_request_forgery_no_url_is_fetched(http: httpx.Client) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
    answer = http.post(CHAT, json=conversation(messages=[{"role": "user", "content": [part]}]))
    assert answer.status_code == 400
    for field in ("api_base", "base_url", "image", "url"):
        answer = http.post(COMPLETIONS, json=completion(**{field: "http://127.0.0.1:9/"}))
        assert (answer.status_code, error_of(answer)["code"]) == (400, "unknown_parameter")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "file:///etc/passwd", "a\nb", "x" * 256, "%2e%2e"]
)
def test_path_traversal_a_models_name_is_only_looked_up(http: httpx.Client, name: str) -> None:
    answer = http.post(COMPLETIONS, json=completion(model=name))
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", "Bearer {key}"), ("Authorization", "Bearer other")],
        [("Authorization", "Basic {key}")],
        [("X-API-Key", "{key}"), ("X-API-Key", "other")],
        [("Authorization", "Bearer {key}"), ("X-API-Key", "other")],
        [("Host", "evil.example"), ("X-Original-URL", "/health/live")],
        [("X-Forwarded-Prefix", "/health"), ("X-Rewrite-Url", "/health/live")],
    ],
)
def test_header_confusion_opens_nothing(server: GatewayServer, headers: list[tuple[str, str]]) -> None:
    key = KEYS.add("tenant")
    filled = [(name, value.replace("{key}", key)) for name, value in headers]
    answer = httpx.get(server.url + "/v1/models", headers=filled)
    assert answer.status_code == 401
    assert key not in answer.text


def test_log_injection_and_secrets_in_logs(
    http: httpx.Client, server: GatewayServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    forged = "x\r\n2026-01-01T00:00:00.000Z ERROR penstock forged"
    http.post(COMPLETIONS, json=completion(model=forged))
    http.get("/v1/models/" + "%0d%0aforged")
    key = http.headers["authorization"].removeprefix("Bearer ")
    httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}x"})
    lines = [TextFormatter().format(record) for record in caplog.records]
    assert lines
    assert all("\n" not in line and "\r" not in line for line in lines)
    secret = key.rpartition("_")[2]
    assert all(secret not in line for line in lines)


def test_secrets_in_errors(http: httpx.Client, server: GatewayServer) -> None:
    server.client.behavior = Behavior(error=RuntimeError("postgresql://user:pn-secret@db/ and /root/model"))
    answer = http.post(COMPLETIONS, json=completion(temperature=1))
    assert answer.status_code == 500
    assert "pn-secret" not in answer.text
    assert "/root" not in answer.text
    assert answer.headers["x-request-id"] in answer.text


def test_error_text_of_an_engine_reaches_the_client_as_written(http: httpx.Client, server: GatewayServer) -> None:
    server.client.behavior = Behavior(error=EngineError("The generation failed."))
    assert error_of(http.post(COMPLETIONS, json=completion(temperature=1)))["message"] == "The generation failed."


def test_health_says_nothing_but_its_state(server: GatewayServer) -> None:
    for path in ("/health", "/health/ready", "/health/live"):
        answer = httpx.get(server.url + path)
        assert set(answer.json()) == {"status"}


def test_prefix_cache_is_salted_with_the_tenant(server: GatewayServer, http: httpx.Client) -> None:
    """What the engine does with it: tests/engine and tests/e2e/test_tenants.py."""
    server.client.requests.clear()
    http.post(COMPLETIONS, json=completion(temperature=1))
    (request,) = server.client.requests
    assert request.tenant == "tenant"


def test_a_flood_of_bad_requests_leaves_nothing_behind(http: httpx.Client, server: GatewayServer) -> None:
    for number in range(100):
        http.post(COMPLETIONS, content=b"{" * number, headers={"Content-Type": "application/json"})
    deadline = time.monotonic() + 5
    while (server.gateway.in_flight or server.gateway.preparing) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (server.gateway.in_flight, server.gateway.preparing) == (0, 0)
    assert http.post(COMPLETIONS, json=completion()).status_code == 200
