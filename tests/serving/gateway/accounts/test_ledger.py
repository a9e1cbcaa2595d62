"""The ledger's way from the hot path to a database that comes and goes: nothing is lost, nothing is counted twice, nothing blocks."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from penstock.serving.gateway.accounts import ledger as ledger_module
from penstock.serving.gateway.accounts.ledger import UsageLedger
from penstock.serving.gateway.accounts.prices import Price, PriceTable
from penstock.serving.gateway.accounts.spool import Spool, SpoolFolder
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.accounts.ledger_records import FakeWriter, usage

PRICES = PriceTable(default=Price(1_000_000, 500_000, 2_000_000))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - files and counters have no event
            await asyncio.sleep(0.005)


class Bench:
    """A ledger over a fake database with quick intervals."""

    def __init__(self, folder: Path | None, limit_bytes: int = 16 << 20) -> None:
        self.writer = FakeWriter()
        self.recorder = Recorder()
        self.folder = folder
        self.ledger = UsageLedger(
            self.writer,
            self.recorder,
            prices=PRICES,
            spools=None if folder is None else SpoolFolder(folder, limit_bytes),
            journal_interval_s=0.01,
            retry_s=(0.01, 0.05),
        )

    def fate(self, name: str) -> int:
        return int(self.recorder.value(metrics.USAGE_WRITTEN, name))

    def files(self) -> list[Path]:
        assert self.folder is not None
        return sorted(self.folder.glob("*.spool"))


@pytest.fixture(params=["spool", "memory"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "spool" if request.param == "spool" else None)
    await bench.ledger.start()
    yield bench
    await bench.ledger.close()


@pytest.fixture
async def spooled(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "spool")
    await bench.ledger.start()
    yield bench
    await bench.ledger.close()


async def test_records_reach_the_database_in_batches_with_their_cost(bench: Bench) -> None:
    for number in range(1200):
        bench.ledger.record(usage(f"r{number}", prompt=10, cached=4, output=5))
    await bench.ledger.flush()
    assert len(bench.writer.written) == 1200
    assert max(bench.writer.batches) == 500
    assert bench.writer.written["r7"].cost_micros == 6 + 2 + 10
    assert (bench.fate("written"), bench.fate("lost"), bench.fate("spooled")) == (1200, 0, 0)
    assert bench.ledger.pending == 0
    if bench.folder is not None:
        await until(lambda: [path.stat().st_size for path in bench.files()] == [16])


async def test_lost_acknowledgement_is_not_counted_twice(bench: Bench) -> None:
    bench.writer.lose_acknowledgements = 3
    for number in range(10):
        bench.ledger.record(usage(f"r{number}"))
    await bench.ledger.flush()
    assert len(bench.writer.written) == 10
    assert bench.writer.batches == [10, 10, 10, 10]
    assert (bench.fate("written"), bench.fate("duplicate")) == (0, 10)


async def test_outage_is_bridged_in_order_with_two_log_lines(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock")
    bench.writer.away = True
    for number in range(100):
        bench.ledger.record(usage(f"r{number}"))
        if number % 10 == 0:
            await asyncio.sleep(0.005)
    await until(lambda: bench.writer.attempts >= 4)
    assert bench.ledger.pending == 100
    assert bench.recorder.value(metrics.STORE_UP, "database") == 0
    assert len(caplog.records) == 1
    assert "connection refused" in caplog.messages[0]
    bench.writer.away = False
    await bench.ledger.flush()
    assert list(bench.writer.written) == [f"r{number}" for number in range(100)]
    await until(lambda: len(caplog.records) == 2)
    assert bench.recorder.value(metrics.STORE_UP, "database") == 1
    assert bench.fate("lost") == 0
    if bench.folder is not None:
        assert bench.fate("spooled") > 0


async def test_attempts_pause_while_the_database_is_away(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.ledger = UsageLedger(
        bench.writer,
        bench.recorder,
        spools=SpoolFolder(tmp_path, 1 << 20),
        journal_interval_s=0.001,
        retry_s=(0.01, 60),
    )
    await bench.ledger.start()
    bench.writer.away = True
    for number in range(300):
        bench.ledger.record(usage(f"r{number}"))
        await asyncio.sleep(0.001)
    # Pauses of 10, 20, 40 … ms: records that arrive do not make attempts.
    assert bench.writer.attempts < 30
    await bench.ledger.close()


async def test_one_bad_record_does_not_cost_the_others(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.writer.bad = {"r3", "r77"}
    for number in range(100):
        bench.ledger.record(usage(f"r{number}"))
    await bench.ledger.flush()
    assert len(bench.writer.written) == 98
    assert (bench.fate("written"), bench.fate("lost")) == (98, 2)
    assert [message for message in caplog.messages if "lost" in message] == [
        "usage records are lost: the database refuses request r3 (value out of range); "
        "penstock_usage_records_total counts all of them"
    ]


async def test_names_that_a_database_refuses_are_made_harmless(bench: Bench) -> None:
    bench.ledger.record(usage("r1", tenant="a\0b\ud800" + "c" * 1000, key="jwt:\udfff", prompt=-4, output=1 << 80))
    await bench.ledger.flush()
    written = bench.writer.written["r1"].usage
    assert written.tenant == "a?b?" + "c" * 764
    assert written.key_id == "jwt:?"
    assert (written.prompt_tokens, written.output_tokens) == (0, 1 << 40)


async def test_queue_is_bounded_and_record_never_raises(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    # Nothing moves before the loop runs.
    for number in range(ledger_module.QUEUE_RECORDS + 500):
        bench.ledger.record(usage(f"r{number}"))
    assert bench.fate("lost") == 500
    assert [message for message in caplog.messages if "lost" in message] == [
        "usage records are lost: they arrive faster than they can be kept; penstock_usage_records_total counts all of them"
    ]
    await bench.ledger.flush()
    assert len(bench.writer.written) == ledger_module.QUEUE_RECORDS


async def test_memory_is_bounded_without_a_spool(tmp_path: Path) -> None:
    bench = Bench(None)
    await bench.ledger.start()
    bench.writer.away = True
    for part in range(3):
        for number in range(10_000):
            bench.ledger.record(usage(f"r{part}-{number}"))
        await until(lambda: not bench.ledger._incoming)
    await until(lambda: bench.fate("lost") == 30_000 - ledger_module.QUEUE_RECORDS)
    assert bench.ledger.pending == ledger_module.QUEUE_RECORDS
    await bench.ledger.close()
    assert bench.fate("lost") == 30_000


async def test_full_spool_loses_what_is_beyond_it_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path, limit_bytes=20_000)
    await bench.ledger.start()
    bench.writer.away = True
    for number in range(300):
        bench.ledger.record(usage(f"r{number}"))
        if number % 50 == 0:
            await asyncio.sleep(0.02)
    await until(lambda: bench.fate("lost") > 0)
    assert bench.files()[0].stat().st_size <= 20_000
    assert len([message for message in caplog.messages if "the spool file is full" in message]) == 1
    bench.writer.away = False
    await bench.ledger.flush()
    assert 50 < len(bench.writer.written) == 300 - bench.fate("lost") < 300
    await bench.ledger.close()


async def test_close_writes_everything_and_removes_the_file(spooled: Bench) -> None:
    for number in range(700):
        spooled.ledger.record(usage(f"r{number}"))
    await spooled.ledger.close()
    assert len(spooled.writer.written) == 700
    assert spooled.files() == []
    spooled.ledger.record(usage("late"))
    assert spooled.fate("lost") == 1
    await spooled.ledger.close()


async def test_close_without_start_loses_nothing_silently(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.ledger.record(usage("r1"))
    await bench.ledger.close()
    assert bench.fate("lost") == 1


async def test_close_while_the_database_is_away_leaves_the_rest_to_the_next_process(
    spooled: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    assert spooled.folder is not None
    spooled.writer.away = True
    for number in range(20):
        spooled.ledger.record(usage(f"r{number}"))
    await spooled.ledger.close()
    assert "20 usage records stay in" in caplog.text
    assert spooled.fate("lost") == 0
    successor = Bench(spooled.folder)
    await successor.ledger.start()
    successor.ledger.record(usage("r20"))
    await successor.ledger.flush()
    assert list(successor.writer.written) == [f"r{number}" for number in range(21)]
    await successor.ledger.close()


async def test_close_gives_up_on_a_database_that_hangs(spooled: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(batch: object) -> int:
        await asyncio.Event().wait()
        return 0

    monkeypatch.setattr(spooled.writer, "write", hang)
    spooled.ledger.record(usage("r1"))
    await spooled.ledger.close(timeout_s=0.05)
    assert len(spooled.files()) == 1


async def test_records_are_in_the_file_while_the_database_hangs(
    spooled: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()
    write = spooled.writer.write

    async def hang(batch: list[object]) -> int:
        await release.wait()
        return await write(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(spooled.writer, "write", hang)
    spooled.ledger.record(usage("r1"))
    await until(lambda: spooled.files()[0].stat().st_size > 16)
    size = spooled.files()[0].stat().st_size
    spooled.ledger.record(usage("r2"))
    await until(lambda: spooled.files()[0].stat().st_size > size)
    release.set()
    await spooled.ledger.flush()
    assert list(spooled.writer.written) == ["r1", "r2"]


async def test_spools_of_dead_processes_are_taken_over(spooled: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spooled.folder is not None
    writer = spooled.writer
    # Two other gateway processes die while the database is away.
    dead = [Bench(spooled.folder) for _ in range(2)]
    for number, other in enumerate(dead):
        await other.ledger.start()
        other.writer.away = True
        for record in range(5):
            other.ledger.record(usage(f"dead{number}-{record}"))
    assert len(spooled.files()) == 3
    for other in dead:
        await other.ledger.close()
    monkeypatch.setattr(ledger_module, "HOUSEKEEPING_INTERVAL_S", 0.01)
    spooled.ledger._housekeeping_at = 0.0
    spooled.ledger.record(usage("own"))
    await until(lambda: len(writer.written) == 11)
    await until(lambda: len(spooled.files()) == 1)


async def test_disk_that_fails_costs_nothing_while_the_database_is_there(
    spooled: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Spool, items: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", full)
        for number in range(40):
            spooled.ledger.record(usage(f"r{number}"))
            await asyncio.sleep(0.002)
        await spooled.ledger.flush()
    assert len(spooled.writer.written) == 40
    assert len([message for message in caplog.messages if "No space left" in message]) == 1
    spooled.ledger.record(usage("after"))
    await spooled.ledger.flush()
    assert "after" in spooled.writer.written


async def test_folder_that_cannot_be_used_is_said_and_memory_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    bench = Bench(blocked / "spool")
    await bench.ledger.start()
    bench.ledger.record(usage("r1"))
    await bench.ledger.flush()
    assert list(bench.writer.written) == ["r1"]
    assert "spool file of usage" in caplog.text
    await bench.ledger.close()


async def test_spool_damaged_while_in_use_is_counted_and_left_behind(spooled: Bench) -> None:
    spooled.writer.away = True
    for number in range(10):
        spooled.ledger.record(usage(f"r{number}"))
    await until(lambda: spooled.files()[0].stat().st_size > 16)
    with spooled.files()[0].open("r+b") as file:
        file.seek(16)
        file.write(b"\xff" * 100)
    await until(lambda: spooled.fate("lost") == 10)
    spooled.writer.away = False
    spooled.ledger.record(usage("after"))
    await spooled.ledger.flush()
    assert list(spooled.writer.written) == ["after"]


async def test_batch_that_cannot_be_priced_does_not_end_the_ledger(bench: Bench) -> None:
    bench.ledger.record(usage("wrong", model=None))  # type: ignore[arg-type]
    await until(lambda: bench.fate("lost") == 1)
    bench.ledger.record(usage("right"))
    await bench.ledger.flush()
    assert list(bench.writer.written) == ["right"]


async def test_failed_requests_are_not_written(bench: Bench) -> None:
    bench.ledger.record(usage("r1", outcome="failed"))
    bench.ledger.record(usage("r2", outcome="cancelled"))
    await bench.ledger.flush()
    assert list(bench.writer.written) == ["r2"]


async def test_model_without_a_price_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = FakeWriter()
    prices = PriceTable(models={"small": Price(1_000_000, 0, 0)})
    ledger = UsageLedger(writer, Recorder(), prices=prices, journal_interval_s=0.01)
    await ledger.start()
    for number in range(3):
        ledger.record(usage(f"small{number}"))
        ledger.record(usage(f"large{number}", model="large"))
        await ledger.flush()
    await ledger.close()
    assert (writer.written["small0"].cost_micros, writer.written["large0"].cost_micros) == (10, 0)
    assert caplog.messages == ["the price table does not name the model large: its usage costs nothing"]
