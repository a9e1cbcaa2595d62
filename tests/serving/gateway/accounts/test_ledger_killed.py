"""A gateway process killed with SIGKILL loses at most the last second of usage, and what it leaves is counted once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import func, select

from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.ledger import UsageLedger
from penstock.serving.gateway.accounts.ledger_writer import LedgerWriter, spool_folder
from penstock.serving.gateway.accounts.migrate import prepare
from penstock.serving.gateway.accounts.spool import SpoolFolder
from penstock.serving.gateway.accounts.tables import UsageDailyRow, UsageSeenRow
from penstock.telemetry.recorder import Recorder
from tests.services import PostgresServer

# Records without end, a line for each.
CHILD = """
import asyncio, sys
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.ledger_writer import build_ledger
from penstock.core.gateway_config import GatewayConfig
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.accounts.ledger_records import usage

async def main():
    ledger = build_ledger(GatewayConfig(), Database(sys.argv[1]), Recorder())
    await ledger.start()
    number = 0
    while True:
        ledger.record(usage(f"r{number}"))
        print(number, flush=True)
        number += 1
        await asyncio.sleep(0.002)

asyncio.run(main())
"""
ROOT = Path(__file__).resolve().parents[4]


async def killed_child(url: str, seconds: float) -> tuple[int, int]:
    """Numbers of the records that a child made: until a second before it was killed, and in all."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CHILD,
        url,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    made: list[float] = []
    started: float | None = None
    while started is None or time.monotonic() < started + seconds:
        line = await asyncio.wait_for(child.stdout.readline(), 60)
        assert int(line) == len(made)
        made.append(time.monotonic())
        started = started or made[0]
    killed_at = time.monotonic()
    child.send_signal(signal.SIGKILL)
    while line := await child.stdout.readline():
        made.append(time.monotonic())
    await child.wait()
    return sum(moment < killed_at - 1.0 for moment in made), len(made)


@pytest.mark.parametrize("state", ["there", "away"])
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
async def test_loss_is_at_most_the_last_second(
    kind: str, state: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    url = f"sqlite:///{tmp_path}/usage.db"
    if kind == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.fresh()
    database = Database(url)

    # Without its tables the database takes nothing.
    if state == "there":
        await prepare(database)
    until_the_last_second, made = await killed_child(url, 1.6)
    if state == "away":
        await prepare(database)
        [left] = spool_folder(database).iterdir()
        assert left.stat().st_size > 1000
    # The next process takes over what is left.
    successor = UsageLedger(
        LedgerWriter(database), Recorder(), spools=SpoolFolder(spool_folder(database), 1 << 20), journal_interval_s=0.01
    )
    await successor.start()
    await successor.flush()
    await successor.close()
    async with database.read() as connection:
        seen = list((await connection.execute(select(UsageSeenRow.request_id))).scalars())
        sums = (
            await connection.execute(select(func.sum(UsageDailyRow.requests), func.sum(UsageDailyRow.output_tokens)))
        ).one()
    await database.close()
    assert 0 < until_the_last_second <= len(seen) <= made
    # Those that are lost are the last ones, and the sums are exactly those that are there.
    assert set(seen) == {f"r{number}" for number in range(len(seen))}
    assert tuple(map(int, sums)) == (len(seen), 5 * len(seen))
    assert list(spool_folder(database).iterdir()) == []
