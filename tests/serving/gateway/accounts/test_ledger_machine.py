"""Any order of records, outages, lost acknowledgements and deaths: what reached the spool is counted exactly once."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from penstock.serving.gateway.accounts.ledger import UsageLedger
from penstock.serving.gateway.accounts.spool import SpoolFolder
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.accounts.ledger_records import FakeWriter, usage


class LedgerMachine(RuleBasedStateMachine):
    """One database, one gateway process after another."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-ledger-"))
        self.runner = asyncio.Runner()
        self.writer = FakeWriter()
        self.recorder = Recorder()
        self.recorded: list[str] = []
        self.ledger = self.runner.run(self.begin())

    async def begin(self) -> UsageLedger:
        # Short pauses make many interleavings in little time.
        ledger = UsageLedger(
            self.writer,
            self.recorder,
            spools=SpoolFolder(self.folder, 1 << 20),
            journal_interval_s=0.001,
            retry_s=(0.001, 0.002),
        )
        await ledger.start()
        return ledger

    async def reach_the_spool(self) -> None:
        async with asyncio.timeout(20):
            while self.ledger._incoming or self.ledger._moving:  # noqa: ASYNC110 - counters have no event
                await asyncio.sleep(0.001)

    @rule(count=st.integers(1, 30), again=st.booleans())
    def record(self, count: int, again: bool) -> None:
        async def work() -> None:
            new = [f"r{len(self.recorded) + number}" for number in range(count)]
            self.recorded += new
            for request_id in [*new, *(self.recorded[:3] if again else [])]:
                self.ledger.record(usage(request_id))
            await self.reach_the_spool()

        self.runner.run(work())

    @rule(away=st.booleans())
    def database(self, away: bool) -> None:
        self.writer.away = away

    @rule(times=st.integers(1, 3))
    def lose_acknowledgements(self, times: int) -> None:
        self.writer.lose_acknowledgements += times

    @rule(steps=st.integers(0, 20))
    def let_it_work(self, steps: int) -> None:
        async def work() -> None:
            for _ in range(steps):
                await asyncio.sleep(0)

        self.runner.run(work())

    @rule()
    def kill(self) -> None:
        """The tasks stop wherever they are and the kernel closes the file."""

        async def work() -> None:
            ledger = self.ledger
            tasks = [task for task in (ledger._journal_task, ledger._write_task) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            ledger._disk.shutdown()
            for spool in (ledger._spool, ledger._adopted):
                if spool is not None:
                    os.close(spool._file)
            self.ledger = await self.begin()

        self.runner.run(work())

    @rule()
    def restart(self) -> None:
        async def work() -> None:
            await self.ledger.close(timeout_s=1.0)
            self.ledger = await self.begin()

        self.runner.run(work())

    def teardown(self) -> None:
        self.writer.away = False
        self.writer.lose_acknowledgements = 0
        self.runner.run(asyncio.wait_for(self.ledger.flush(), 20))
        self.runner.run(self.ledger.close())
        self.runner.close()
        assert set(self.writer.written) == set(self.recorded)
        assert self.recorder.value(metrics.USAGE_WRITTEN, "lost") == 0
        assert list(self.folder.iterdir()) == []
        shutil.rmtree(self.folder)


LedgerMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
