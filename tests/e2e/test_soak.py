"""The mixed soak: five tenants, cache, limits, cancels, Redis restarted twice, PostgreSQL away for a while. Every request has one outcome,
and the ledger adds up to what the clients counted.

20 minutes: `pytest -m slow tests/e2e/test_soak.py`. PENSTOCK_SOAK_S makes it shorter or longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.testing.server import RunningServer
from tests.services import PostgresServer, RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.redis, pytest.mark.postgresql]

SOAK_S = float(os.environ.get("PENSTOCK_SOAK_S", "1200"))
AWAY_S = min(30.0, SOAK_S / 10)
CLIENTS_PER_TENANT = 3
MAX_TOKENS = 48
WINDOW_S = 60.0
# Tenant → requests per minute of its key (0: no limit).
TENANTS = {"alpha": 0, "beta": 0, "gamma": 120, "delta": 30, "epsilon": 0}


@dataclass
class Count:
    """What one tenant's clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    output_tokens: int = 0
    prompt_tokens: int = 0
    cancelled_tokens: int = 0
    admitted_at: list[float] = field(default_factory=list)


def run_cli(database: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "penstock.cli.main", *arguments, "--database-url", database]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def make_key(database: str, tenant: str, rpm: int) -> str:
    limit = ("--rpm", str(rpm)) if rpm else ()
    key: str = json.loads(run_cli(database, "keys", "create", "--tenant", tenant, *limit, "--json"))["key"]
    return key


class Client:
    """One client of one tenant: asks until `end`, and counts exactly one outcome per request."""

    def __init__(self, http: httpx.AsyncClient, key: str, count: Count, seed: int) -> None:
        self._http = http
        self._headers = {"Authorization": f"Bearer {key}"}
        self._count = count
        self._random = random.Random(seed)

    async def run(self, end: float) -> None:
        while time.monotonic() < end:
            outcome = await self._ask()
            self._count.outcomes[outcome] += 1
            if outcome in ("429", "503"):
                await asyncio.sleep(0.2)

    def _body(self) -> dict[str, Any]:
        choice = self._random
        prompt = f"Story {choice.randrange(6)}:" if choice.random() < 0.5 else f"Story {choice.randrange(10**9)}:"
        return {
            "model": "stories",
            "prompt": prompt,
            "max_tokens": choice.randint(1, MAX_TOKENS),
            "temperature": choice.choice((0.0, 0.0, 0.8)),
            "ignore_eos": True,
        }

    async def _ask(self) -> str:
        body = self._body()
        kind = self._random.random()
        started = time.monotonic()
        try:
            if kind < 0.4:
                return await self._whole(body, started)
            return await self._stream(body, started, cancel=kind > 0.9)
        except httpx.HTTPError as error:
            return f"broken: {type(error).__name__}"

    async def _whole(self, body: dict[str, Any], started: float) -> str:
        answer = await self._http.post("/v1/completions", json=body, headers=self._headers)
        if answer.status_code == 200:
            self._note(answer.json()["usage"], started)
            return "completed"
        return str(answer.status_code)

    async def _stream(self, body: dict[str, Any], started: float, *, cancel: bool) -> str:
        body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        received = 0
        usage: dict[str, int] | None = None
        request = self._http.stream("POST", "/v1/completions", json=body, headers=self._headers)
        async with request as answer:
            if answer.status_code != 200:
                await answer.aread()
                return str(answer.status_code)
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    assert usage is not None
                    self._note(usage, started)
                    return "completed"
                if line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        return f"error: {chunk['error']['code']}"
                    usage = chunk["usage"] or usage
                    received = usage["completion_tokens"] if usage else 0
                    if cancel and received:
                        self._count.cancelled_tokens += received
                        self._count.admitted_at.append(started)
                        return "cancelled"
        return "ended without [DONE]"

    def _note(self, usage: dict[str, int], started: float) -> None:
        self._count.output_tokens += usage["completion_tokens"]
        self._count.prompt_tokens += usage["prompt_tokens"]
        self._count.admitted_at.append(started)


async def disturb(redis: RedisServer, postgres: PostgresServer, start: float) -> None:
    """Redis restarts after a quarter and three quarters of the time; PostgreSQL is away from the middle on."""

    async def until(share: float) -> None:
        await asyncio.sleep(max(0.0, start + share * SOAK_S - time.monotonic()))

    async def restart_redis() -> None:
        await asyncio.to_thread(redis.stop)
        await asyncio.sleep(1)
        await asyncio.to_thread(redis.start)

    await until(0.25)
    await restart_redis()
    await until(0.5)
    await asyncio.to_thread(postgres.stop)
    await asyncio.sleep(AWAY_S)
    await asyncio.to_thread(postgres.start)
    await until(0.75)
    await restart_redis()


def most_in_a_window(times: list[float], length_s: float) -> int:
    ordered, first, most = sorted(times), 0, 0
    for last, moment in enumerate(ordered):
        while moment - ordered[first] >= length_s:
            first += 1
        most = max(most, last - first + 1)
    return most


def ledger(database: str) -> dict[str, dict[str, int]]:
    rows: list[dict[str, Any]] = json.loads(run_cli(database, "usage", "--by", "tenant", "--json"))["rows"]
    return {row["tenant"]: row for row in rows}


@pytest.mark.timeout(SOAK_S + 300)
async def test_every_request_has_one_outcome_and_the_ledger_adds_up(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    redis, database = redis_server.fresh(), postgres_server.fresh()
    keys = {tenant: make_key(database, tenant, rpm) for tenant, rpm in TENANTS.items()}
    counts = {tenant: Count() for tenant in TENANTS}
    flags = ("--auth", "keys", "--redis-url", redis, "--database-url", database)
    with RunningServer("stories", "--kv-cache-gib", "0.1", "--threads", "1", *flags, log=tmp_path / "log") as server:
        start = time.monotonic()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
            clients = [
                Client(http, keys[tenant], counts[tenant], seed=17 * number + place)
                for place, tenant in enumerate(TENANTS)
                for number in range(CLIENTS_PER_TENANT)
            ]
            runs = [client.run(start + SOAK_S) for client in clients]
            await asyncio.gather(disturb(redis_server, postgres_server, start), *runs)
        assert server.get("/health/ready")[0] == 200
    # The server has drained: all usage is written.
    assert server.process.returncode == 0, server.log.read_text()[-2000:]
    written = ledger(database)
    for tenant, count in counts.items():
        check_tenant(tenant, count, written[tenant])


def check_tenant(tenant: str, count: Count, row: dict[str, int]) -> None:
    allowed = {"completed", "cancelled", "429"}
    assert set(count.outcomes) <= allowed, f"{tenant}: {count.outcomes}"
    completed, cancelled = count.outcomes["completed"], count.outcomes["cancelled"]
    assert completed > 0
    assert row["requests"] == completed + cancelled
    excess = row["output_tokens"] - count.output_tokens
    assert count.cancelled_tokens <= excess <= cancelled * MAX_TOKENS
    assert row["prompt_tokens"] >= count.prompt_tokens
    if limit := TENANTS[tenant]:
        # Redis forgot its windows twice, and a client's clock starts before the server's.
        assert most_in_a_window(count.admitted_at, WINDOW_S - 1) <= 2 * limit
        assert count.outcomes["429"] > 0 or len(count.admitted_at) < limit
