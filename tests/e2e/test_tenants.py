"""Two tenants on one real server: what one asked cannot be told by the other, and what they used adds up."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from penstock.testing.server import RunningServer

PROMPT = "The owl and the fox met by the river every morning to talk about the weather. " * 4


def run_cli(database: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", "penstock.cli.main", *arguments, "--json", "--database-url", database]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('accounts') / 'accounts.db'}"


@pytest.fixture(scope="module")
def keys(database: str) -> dict[str, str]:
    return {
        tenant: run_cli(database, "keys", "create", "--tenant", tenant, "--role", role)["key"]
        for tenant, role in (("one", "user"), ("two", "user"), ("operator", "admin"))
    }


@pytest.fixture(scope="module")
def running(database: str, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    flags = ("--auth", "keys", "--database-url", database, "--kv-cache-gib", "0.05", "--threads", "1")
    with RunningServer("stories", *flags, log=tmp_path_factory.mktemp("tenants") / "log") as server:
        yield server


def ask(running: RunningServer, key: str, **more: Any) -> openai.types.Completion:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0, timeout=60) as api:
        answer: openai.types.Completion = api.completions.create(
            model="stories", prompt=PROMPT, max_tokens=4, temperature=0, **more
        )
        return answer


def cached_tokens(answer: openai.types.Completion) -> int:
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_no_tenant_finds_the_prefix_of_another(running: RunningServer, keys: dict[str, str]) -> None:
    fresh = {"extra_headers": {"Cache-Control": "no-store"}}
    assert cached_tokens(ask(running, keys["one"], **fresh)) == 0
    assert cached_tokens(ask(running, keys["one"], **fresh)) > 0
    assert cached_tokens(ask(running, keys["two"], **fresh)) == 0


def test_usage_adds_up_in_the_ledger(running: RunningServer, keys: dict[str, str], database: str) -> None:
    def used() -> dict[str, Any]:
        return {row["tenant"]: row for row in run_cli(database, "usage", "--by", "tenant")["rows"]}

    before = used().get("one", {"requests": 0, "output_tokens": 0})
    answers = [ask(running, keys["one"], seed=number % 2) for number in range(4)]
    spent = sum(answer.usage.completion_tokens for answer in answers if answer.usage is not None)
    deadline = time.monotonic() + 20
    while (after := used()["one"])["requests"] < before["requests"] + 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after["requests"] == before["requests"] + 4
    assert after["output_tokens"] == before["output_tokens"] + spent


def test_an_admin_key_manages_keys_over_http(running: RunningServer, keys: dict[str, str]) -> None:
    import httpx

    admin = {"Authorization": f"Bearer {keys['operator']}"}
    user = {"Authorization": f"Bearer {keys['one']}"}
    with httpx.Client(base_url=running.url, timeout=20) as http:
        assert http.get("/admin/keys", headers=user).status_code == 403
        made = http.post("/admin/keys", headers=admin, json={"tenant": "three", "rpm": 5})
        assert made.status_code in (200, 201)
        key = made.json()["key"]
        assert ask(running, key).choices[0].finish_reason == "length"
        assert http.delete(f"/admin/keys/{made.json()['id']}", headers=admin).status_code in (200, 204)
        deadline = time.monotonic() + 10
        while http.get("/v1/models", headers={"X-API-Key": key}).status_code != 401:
            assert time.monotonic() < deadline, "the key still works"
            time.sleep(0.05)
        page = http.get("/metrics", headers=admin)
        assert page.status_code == 200
        assert 'penstock_response_cache_total{model="stories"' in page.text
        assert http.get("/metrics", headers=user).status_code == 403
