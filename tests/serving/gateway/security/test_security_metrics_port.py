"""/metrics on a port of its own."""

from __future__ import annotations

import pytest

from penstock.serving.gateway.metrics_server import create_metrics_app
from tests.serving.gateway.security.asgi_client import ask


async def render() -> bytes:
    return b"penstock_build_info 1\n"


async def test_two_routes_and_nothing_else() -> None:
    app = create_metrics_app(render, "127.0.0.1")
    answer = await ask(app, "/metrics")
    assert (answer.status, answer.body) == (200, b"penstock_build_info 1\n")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (await ask(app, "/metrics", method="HEAD")).status == 200
    assert (await ask(app, "/health/live")).json() == {"status": "live"}
    for path in ("/", "/v1/models", "/admin/keys", "/metrics/", "//metrics", "/health"):
        answer = await ask(app, path)
        assert (answer.status, answer.code) == (404, "not_found")
        assert "x-request-id" in answer.headers
    answer = await ask(app, "/metrics", method="POST")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 403), ("0.0.0.0", 200)])  # noqa: S104
async def test_on_loopback_no_page_of_the_web_reads_it(host: str, status: int) -> None:
    app = create_metrics_app(render, host)
    assert (await ask(app, "/metrics", host=b"rebound.example")).status == status


async def test_a_scrape_that_fails_says_nothing_of_why() -> None:
    async def fails() -> bytes:
        raise RuntimeError("internal detail")

    answer = await ask(create_metrics_app(fails, "127.0.0.1"), "/metrics")
    assert (answer.status, answer.code) == (500, "internal_error")
    assert b"internal detail" not in answer.body
