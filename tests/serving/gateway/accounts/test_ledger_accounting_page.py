"""Every row of "Ledger and budget" in docs/accounting.md is what the ledger writes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import select

from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.interface import UsageRecord
from penstock.serving.gateway.accounts.ledger import UsageLedger
from penstock.serving.gateway.accounts.ledger_writer import LedgerWriter
from penstock.serving.gateway.accounts.migrate import prepare
from penstock.serving.gateway.accounts.prices import Price, PriceTable
from penstock.serving.gateway.accounts.tables import UsageDailyRow
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.accounts.ledger_records import usage

PAGE = Path(__file__).resolve().parents[4] / "docs" / "accounting.md"
# Micro-units per token: 1 for prompt, 0.25 for cached, 4 for output.
PRICES = PriceTable(default=Price(1_000_000, 250_000, 4_000_000))
NOT_WRITTEN = None


@dataclass(frozen=True)
class Case:
    """`records`: what the gateway hands over. `written`: requests, prompt, cached and output tokens, cost."""

    row: str
    records: tuple[UsageRecord, ...]
    written: tuple[int, int, int, int, int] | None


CASES = [
    Case("miss, bypass", (usage("r", prompt=100, cached=40, output=10),), (1, 100, 40, 10, 60 + 10 + 40)),
    Case("miss, bypass", (usage("r", cache="bypass", prompt=100, output=10),), (1, 100, 0, 10, 100 + 40)),
    Case("hit", (usage("r", cache="hit", prompt=100, cached=100, output=10),), (1, 100, 100, 10, 0)),
    Case("coalesced", (usage("r", cache="coalesced", prompt=100, cached=100, output=10),), (1, 100, 100, 10, 0)),
    Case(
        "cancelled", (usage("r", outcome="cancelled", prompt=100, cached=20, output=3),), (1, 100, 20, 3, 80 + 5 + 12)
    ),
    # The engine had not begun.
    Case("cancelled", (usage("r", outcome="cancelled", prompt=0, output=0),), (1, 0, 0, 0, 0)),
    Case("rejected, invalid", (), NOT_WRITTEN),
    Case("failed (5xx)", (usage("r", outcome="failed", prompt=100, output=10),), NOT_WRITTEN),
    # One request and one record, whatever the number of engines that worked on it; written twice it counts once.
    Case("resumed", (usage("r", prompt=100, output=10),) * 2, (1, 100, 0, 10, 140)),
]


def page_rows() -> list[str]:
    """The outcomes in the first column of the table."""
    section = PAGE.read_text().partition("## Ledger and budget\n")[2].partition("\n## ")[0]
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), section.strip().splitlines()))
    return [line.split("|")[1].strip() for line in lines[2:]]


def test_every_row_has_a_case() -> None:
    assert page_rows()
    assert set(page_rows()) == {case.row for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
async def test_row(case: Case, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/usage.db")
    await prepare(database)
    ledger = UsageLedger(LedgerWriter(database), Recorder(), prices=PRICES, journal_interval_s=0.01)
    await ledger.start()
    for record in case.records:
        ledger.record(record)
    await ledger.close()
    row = UsageDailyRow
    columns = (row.requests, row.prompt_tokens, row.cached_tokens, row.output_tokens, row.cost_micros)
    async with database.read() as connection:
        found = [tuple(entry) for entry in await connection.execute(select(*columns))]
    await database.close()
    assert found == ([] if case.written is None else [case.written])
