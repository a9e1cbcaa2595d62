"""One real server with the embedded model for all tests that do not break it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from penstock.testing.server import RunningServer
from tests.services import postgres_server, redis_server

__all__ = ["postgres_server", "redis_server"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    with RunningServer("stories", "--kv-cache-gib", "0.05", "--threads", "1", log=log) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        default_headers={"Cache-Control": "no-store"},
        timeout=60,
    ) as running:
        yield running
