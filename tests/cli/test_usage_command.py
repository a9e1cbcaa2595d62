"""`penstock usage`: table, CSV and JSON of what the ledger wrote, from SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from pathlib import Path

import pytest

from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.interface import UsageRecord
from penstock.serving.gateway.accounts.ledger_writer import LedgerWriter
from penstock.serving.gateway.accounts.migrate import prepare
from penstock.serving.gateway.accounts.prices import PricedUsage
from penstock.serving.gateway.cache.interface import CacheOutcome
from tests.cli.conftest import Invoke
from tests.services import PostgresServer, postgres_server

__all__ = ["postgres_server"]

MARCH = 1772323200.0
DAY_S = 86400.0


def item(
    number: int,
    cost: int,
    *,
    day: int = 0,
    key: str = "k1",
    tenant: str = "acme",
    model: str = "small",
    cache: CacheOutcome = "miss",
) -> PricedUsage:
    record = UsageRecord(
        request_id=f"r{number}",
        at=MARCH + day * DAY_S,
        key_id=key,
        tenant=tenant,
        model=model,
        outcome="completed",
        cache=cache,
        prompt_tokens=1000,
        cached_tokens=100,
        output_tokens=10,
    )
    return PricedUsage(record, cost)


ITEMS = [
    item(1, 1_500_000),
    item(2, 1),
    item(3, 0, day=1, cache="hit"),
    item(4, 250_000, day=1, key="k2", model="large"),
    item(5, 1_000_000_000_000, day=2, key="=1+1", tenant="beta\x1b[31m"),
]


def fill(url: str, items: list[PricedUsage]) -> str:
    async def write() -> None:
        database = Database(url)
        await prepare(database)
        if items:
            await LedgerWriter(database).write(items)
        await database.close()

    asyncio.run(write())
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return fill(f"sqlite:///{tmp_path}/usage.db", ITEMS)
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return fill(server.fresh(), ITEMS)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return fill(f"sqlite:///{tmp_path}/usage.db", ITEMS)


def test_table_with_totals(invoke: Invoke, url: str) -> None:
    result = invoke("usage", "--database-url", url)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "day         requests  cache hits  prompt tokens  cached  output tokens              cost",
        "----------  --------  ----------  -------------  ------  -------------  ----------------",
        "2026-03-01         2           0          2,000     200             20          1.500001",
        "2026-03-02         2           1          2,000     200             20          0.250000",
        "2026-03-03         1           0          1,000     100             10  1,000,000.000000",
        "----------  --------  ----------  -------------  ------  -------------  ----------------",
        "total              5           1          5,000     500             50  1,000,001.750001",
    ]


def test_csv_is_exact_and_inert(invoke: Invoke, url: str) -> None:
    result = invoke("usage", "--by", "key", "--by", "tenant", "--csv", "--database-url", url)
    assert result.code == 0
    assert list(csv.reader(io.StringIO(result.out))) == [
        ["key", "tenant", "requests", "cache_hits", "prompt_tokens", "cached_tokens", "output_tokens", "cost"],
        ["'=1+1", "beta\\u001b[31m", "1", "0", "1000", "100", "10", "1000000.000000"],
        ["k1", "acme", "3", "1", "3000", "300", "30", "1.500001"],
        ["k2", "acme", "1", "0", "1000", "100", "10", "0.250000"],
    ]


def test_json(invoke: Invoke, url: str, tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('currency = "EUR"')
    result = invoke("usage", "--by", "model", "--json", "--price-table", str(prices), "--database-url", url)
    assert result.code == 0
    report = json.loads(result.out)
    assert report["currency"] == "EUR"
    assert [row["model"] for row in report["rows"]] == ["large", "small"]
    assert report["rows"][0] == {
        "model": "large",
        "requests": 1,
        "cache_hits": 0,
        "prompt_tokens": 1000,
        "cached_tokens": 100,
        "output_tokens": 10,
        "cost": "0.250000",
    }
    assert report["total"]["cost"] == "1000001.750001"


@pytest.mark.parametrize(
    ("options", "requests"),
    [
        (("--tenant", "acme"), 4),
        (("--key", "k2"), 1),
        (("--model", "large"), 1),
        (("--tenant", "acme", "--model", "small", "--from", "2026-03-02"), 1),
        (("--from", "2026-03-02"), 3),
        (("--to", "2026-03-02"), 4),
        (("--from", "2026-03-02", "--to", "2026-03-02"), 2),
        (("--tenant", "' OR 1=1 --"), 0),
        (("--tenant", ""), 0),
    ],
)
def test_filters(invoke: Invoke, url: str, options: tuple[str, ...], requests: int) -> None:
    result = invoke("usage", "--json", "--database-url", url, *options)
    assert result.code == 0
    assert json.loads(result.out)["total"]["requests"] == requests


def test_control_characters_do_not_reach_the_terminal(invoke: Invoke, sqlite_url: str) -> None:
    result = invoke("usage", "--by", "tenant", "--database-url", sqlite_url)
    assert "\x1b" not in result.out
    assert "beta\\u001b[31m" in result.out


def test_nothing_used_yet(invoke: Invoke, tmp_path: Path) -> None:
    url = fill(f"sqlite:///{tmp_path}/usage.db", [])
    assert invoke("usage", "--database-url", url).out == "No usage.\n"
    assert json.loads(invoke("usage", "--json", "--database-url", url).out)["rows"] == []
    assert invoke("usage", "--csv", "--database-url", url).out.count("\n") == 1


def test_usage_without_authentication_has_no_names(invoke: Invoke, tmp_path: Path) -> None:
    url = fill(f"sqlite:///{tmp_path}/usage.db", [item(1, 0, key="", tenant="")])
    line = invoke("usage", "--by", "tenant", "--by", "key", "--database-url", url).out.splitlines()[2]
    assert line.split() == ["-", "-", "1", "0", "1,000", "100", "10", "0.000000"]


def test_url_from_the_environment(invoke: Invoke, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_DATABASE_URL", sqlite_url)
    assert invoke("usage", "--by", "model").out.count("\n") == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--from", "2026-03-02", "--to", "2026-03-01"), "is after --to"),
        (("--from", "yesterday"), "yesterday"),
        (("--by", "hour"), "hour"),
        (("--database-url", "mysql://host/x"), "mysql"),
        (("--price-table", "/no/such.toml"), "/no/such.toml"),
    ],
)
def test_wrong_options_are_one_line(invoke: Invoke, sqlite_url: str, options: tuple[str, ...], said: str) -> None:
    result = invoke("usage", "--database-url", sqlite_url, *options)
    assert result.code == 2
    assert said in result.err
    assert result.err.count("\n") == 1


def test_missing_database_is_not_created(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("usage", "--database-url", f"sqlite:///{tmp_path}/none.db")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "There is no database" in result.err
    assert list(tmp_path.glob("none.db*")) == []


def test_database_without_our_tables(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    result = invoke("usage", "--database-url", f"sqlite:///{tmp_path}/empty.db")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "has no usage" in result.err


@pytest.mark.postgresql
def test_server_that_is_away_is_one_line_without_password(invoke: Invoke) -> None:
    result = invoke("usage", "--database-url", "postgresql://penstock:pn-secret@127.0.0.1:1/x")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "cannot be read" in result.err
    assert "pn-secret" not in result.err
