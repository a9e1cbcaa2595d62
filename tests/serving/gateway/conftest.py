"""One server for most tests; its behavior is reset before each."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from penstock.core.config import ServerConfig
from penstock.serving.frontend.client import Health
from penstock.testing.fake_client import Behavior
from penstock.testing.gateway_server import GatewayServer


@pytest.fixture(scope="session")
def shared_server() -> Iterator[GatewayServer]:
    config = ServerConfig(port=0, drain_timeout_s=1, max_body_bytes=200_000, request_timeout_s=20)
    with GatewayServer(config) as server:
        yield server


@pytest.fixture
def server(shared_server: GatewayServer) -> GatewayServer:
    shared_server.client.behavior = Behavior()
    shared_server.client.health_now = Health(live=True, ready=True)
    shared_server.client.requests.clear()
    shared_server.client.closed_early.clear()
    return shared_server


@pytest.fixture(scope="session")
def shared_openai(shared_server: GatewayServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=shared_server.url + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def api(server: GatewayServer, shared_openai: openai.OpenAI) -> openai.OpenAI:
    """The official client."""
    return shared_openai


@pytest.fixture(scope="session")
def shared_http(shared_server: GatewayServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_server.url, timeout=30) as client:
        yield client


@pytest.fixture
def http(server: GatewayServer, shared_http: httpx.Client) -> httpx.Client:
    """Plain HTTP."""
    return shared_http
