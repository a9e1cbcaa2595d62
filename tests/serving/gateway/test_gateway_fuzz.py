"""Random requests made from the server's own OpenAPI document: never a 5xx, never a hang, always an answer that the document describes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from penstock.core.config import ServerConfig
from penstock.serving.gateway.app import create_app
from penstock.testing.fake_client import Behavior
from penstock.testing.gateway_server import MODEL, GatewayServer

TIMEOUT_S = 10
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[GatewayServer]:
    with GatewayServer(ServerConfig(port=0, drain_timeout_s=1, request_timeout_s=5)) as server:
        server.client.behavior = Behavior(reply="ab")
        yield server


@pytest.fixture(scope="module")
def document(fuzzed: GatewayServer) -> Any:
    return schemathesis.openapi.from_url(fuzzed.url + "/openapi.json")


PATHS = create_app({}, ServerConfig()).openapi()["paths"]
OPERATIONS = [
    (path, method, mode)
    for path, methods in PATHS.items()
    for method, operation in methods.items()
    # What takes no body has nothing that could be wrong.
    for mode in ([*GenerationMode] if "requestBody" in operation else [GenerationMode.POSITIVE])
]


def attack(document: Any, path: str, method: str, mode: Any, examples: int) -> None:
    """Send `examples` generated requests to one operation and check each answer."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method.upper()].as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            # A random name would always end at "no such model".
            case.body["model"] = MODEL
        case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)

    send()


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_no_request_breaks_the_server(document: Any, path: str, method: str, mode: Any) -> None:
    attack(document, path, method, mode, examples=6 if method != "get" else 2)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_many_requests_do_not_break_the_server(document: Any, path: str, method: str, mode: Any) -> None:
    attack(document, path, method, mode, examples=300)


def test_the_document_describes_the_bodies(fuzzed: GatewayServer) -> None:
    paths = fuzzed.app.openapi()["paths"]
    schemas = fuzzed.app.openapi()["components"]["schemas"]
    reference = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    chat = schemas[reference.rpartition("/")[2]]
    assert set(chat["required"]) == {"model", "messages"}
    assert chat["additionalProperties"] is False
    assert chat["properties"]["tools"]["enum"] == [None, []]
    assert {"type": "null"} in chat["properties"]["temperature"]["anyOf"]
    assert set(paths) >= {"/v1/completions", "/v1/models", "/v1/models/{model}", "/metrics", "/v1/tokenize", "/version"}
