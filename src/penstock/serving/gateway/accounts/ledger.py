"""The usage ledger's way from the hot path to the database. docs/accounting.md says what is charged.

    record() ─▶ queue ─ every 0.25 s ─▶ spool file ─ batches ─▶ database (ledger_writer), then acknowledged in the spool
                                        └ not usable: memory, bounded

Every record passes through the spool, so that a process that is killed loses only what came in the last quarter of a second, however long
the database takes or stays away. Operations on the file run on a thread of their own. The file is not synced while the database
takes records (it will have them within moments) and at every append while it is away: then a loss of power costs no more
than a killed process.

While the database fails, one attempt at a time is made, with growing pauses; one log line says that it is away and one that it is
back. The writer counts a request id once, so whatever is in doubt is written again: a batch whose acknowledgement was lost, a spool of a
process that died between commit and acknowledgement. The memory of request ids goes back seven days; a spool that lay
unread for longer may count its last batch twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from penstock.serving.gateway.accounts.interface import UsageRecord
from penstock.serving.gateway.accounts.prices import FREE, PricedUsage, PriceTable, storable
from penstock.serving.gateway.accounts.spool import Spool, SpoolFolder
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

T = TypeVar("T")
STORE = "database"
PURPOSE = "usage"
# Records in memory: before their first way to the spool, and those that no spool takes.
QUEUE_RECORDS = 16_384
BATCH_RECORDS = 500
JOURNAL_INTERVAL_S = 0.25
# Pause after the first failure of an outage, and the longest.
RETRY_S = (0.25, 5.0)
HOUSEKEEPING_INTERVAL_S = 30.0
_WARNED_MODELS = 64


class BatchWriter(Protocol):
    """What the ledger asks of the database."""

    async def write(self, batch: Sequence[PricedUsage]) -> int:
        """Count each request id once, all of the batch in one transaction; how many were new. Raises StoreUnavailableError,
        BadRecordError."""
        ...

    async def housekeeping(self) -> None:
        """What has to be done now and then. Raises StoreUnavailableError."""
        ...


class BadRecordError(Exception):
    """The database is there and takes a batch for wrong in itself: trying again will not help."""


class UsageLedger:
    """A UsageSink. Used from one event loop: `start`, any number of `record`, `close`."""

    def __init__(
        self,
        writer: BatchWriter,
        recorder: Recorder,
        *,
        prices: PriceTable = FREE,
        spools: SpoolFolder | None = None,
        journal_interval_s: float = JOURNAL_INTERVAL_S,
        retry_s: tuple[float, float] = RETRY_S,
    ) -> None:
        self._writer = writer
        self._recorder = recorder
        self._prices = prices
        self._spools = spools
        self._journal_interval_s = journal_interval_s
        self._first_retry_s, self._longest_retry_s = retry_s
        self._incoming: deque[UsageRecord] = deque()
        self._memory: deque[PricedUsage] = deque()
        self._spool: Spool | None = None
        self._adopted: Spool | None = None
        self._arrived = asyncio.Event()
        self._work = asyncio.Event()
        self._closing = asyncio.Event()
        self._moving = 0
        self._closed = self._journal_ended = False
        self._away = False
        self._loss_logged = False
        self._disk_failed = False
        self._warned_models: set[str] = set()
        self._housekeeping_at = 0.0
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="penstock-usage-spool")
        self._journal_task: asyncio.Task[None] | None = None
        self._write_task: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Records that the database does not have yet."""
        spooled = sum(len(spool) for spool in (self._spool, self._adopted) if spool is not None)
        return len(self._incoming) + self._moving + len(self._memory) + spooled

    def record(self, usage: UsageRecord) -> None:
        """See UsageSink. A request that failed owes nothing and is not written."""
        if usage.outcome == "failed":
            return
        if self._closed or len(self._incoming) >= QUEUE_RECORDS:
            self._lose(1, "the ledger is closed" if self._closed else "they arrive faster than they can be kept")
            return
        self._incoming.append(usage)
        if not self._arrived.is_set():
            self._arrived.set()

    async def start(self) -> None:
        """Open the spool, take over what dead processes left, and begin to write. The database may be away."""
        self._recorder.set(metrics.STORE_UP, 1, STORE)
        if self._spools is not None:
            try:
                self._spool = await self._on_disk(self._spools.open)
            except OSError as error:
                self._note_disk_failure(error)
        self._journal_task = asyncio.create_task(self._journal_forever(), name="usage-journal")
        self._write_task = asyncio.create_task(self._write_forever(), name="usage-writer")

    async def flush(self) -> None:
        """Wait until the database has all that was recorded before; for ever while it is away."""
        while self.pending:
            self._arrived.set()
            await asyncio.sleep(self._journal_interval_s / 4)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Write what is left, for at most `timeout_s`; what remains stays in the spool. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._closing.set()
        self._arrived.set()
        if self._journal_task is not None and self._write_task is not None:
            await self._journal_task
            self._journal_ended = True
            self._work.set()
            await asyncio.wait({self._write_task}, timeout=timeout_s)
            self._write_task.cancel()
            await asyncio.gather(self._write_task, return_exceptions=True)
        else:
            self._remember(self._price(self._take_incoming()))
        await self._keep_the_rest()
        self._disk.shutdown()

    # ---- queue → spool ----

    async def _journal_forever(self) -> None:
        closing = False
        while not closing:
            await self._arrived.wait()
            await _pause(self._closing, self._journal_interval_s)
            self._arrived.clear()
            closing = self._closed
            await self._journal()
            self._recorder.set(metrics.USAGE_PENDING, self.pending)
            self._work.set()

    async def _journal(self) -> None:
        """Move what has arrived into the spool, or into memory where there is no spool that works."""
        arrived = self._take_incoming()
        self._moving = len(arrived)
        try:
            batch = self._price(arrived)
            if self._spool is None or not await self._append(self._spool, batch):
                self._remember(batch)
        except Exception:
            # What is wrong with one batch must not end the ledger for those that follow.
            logger.exception("a batch of usage records could not be kept")
            self._lose(len(arrived), "see the error above")
        finally:
            self._moving = 0

    async def _append(self, spool: Spool, batch: Sequence[PricedUsage]) -> bool:
        """Whether the file took the batch, or as much of it as it ever will."""
        try:
            taken = await self._on_disk(spool.append, batch)
        except OSError as error:
            self._note_disk_failure(error)
            return False
        self._disk_failed = False
        if taken < len(batch):
            self._lose(len(batch) - taken, "the spool file is full")
        if self._away:
            self._recorder.increment(metrics.USAGE_WRITTEN, "spooled", by=taken)
            try:
                await self._on_disk(spool.sync)
            except OSError as error:
                self._note_disk_failure(error)
        return True

    def _remember(self, batch: Sequence[PricedUsage]) -> None:
        room = QUEUE_RECORDS - len(self._memory)
        self._memory.extend(batch[:room])
        if len(batch) > room:
            self._lose(len(batch) - room, "no spool file takes them and memory is bounded")

    def _take_incoming(self) -> list[UsageRecord]:
        arrived = list(self._incoming)
        self._incoming.clear()
        return arrived

    def _price(self, arrived: Sequence[UsageRecord]) -> list[PricedUsage]:
        for model in self._prices.unpriced(usage.model for usage in arrived):
            if model not in self._warned_models and len(self._warned_models) < _WARNED_MODELS:
                self._warned_models.add(model)
                logger.warning("the price table does not name the model %s: its usage costs nothing", model)
        return [PricedUsage(storable(usage), self._prices.cost_micros(usage)) for usage in arrived]

    # ---- spool → database ----

    async def _write_forever(self) -> None:
        retry_s = self._first_retry_s
        while True:
            # One last round when nothing more can arrive.
            last, failed = self._journal_ended, True
            self._work.clear()
            try:
                await self._drain()
                if not last:
                    await self._look_after()
            except OSError as error:
                self._note_disk_failure(error)
            except Exception as error:
                # Whatever it is, it is logged once and tried again: the records are safe in the spool meanwhile.
                self._note_away(error)
            else:
                self._note_back()
                retry_s, failed = self._first_retry_s, False
            self._recorder.set(metrics.USAGE_PENDING, self.pending)
            if last:
                return
            if failed:
                # `close` ends the pause at once, and then the end of the journal does.
                await _pause(self._work if self._closing.is_set() else self._closing, retry_s)
                retry_s = min(2 * retry_s, self._longest_retry_s)
            else:
                await _pause(self._work, HOUSEKEEPING_INTERVAL_S)

    async def _drain(self) -> None:
        if self._spool is not None:
            await self._drain_spool(self._spool)
        while self._memory:
            batch = [self._memory[index] for index in range(min(BATCH_RECORDS, len(self._memory)))]
            await self._write(batch)
            for _ in batch:
                self._memory.popleft()
        if self._adopted is not None:
            await self._drain_spool(self._adopted)

    async def _drain_spool(self, spool: Spool) -> None:
        while len(spool):
            batch = await self._on_disk(spool.peek, BATCH_RECORDS)
            if not batch:
                self._lose(await self._on_disk(spool.discard), f"{spool.path} was changed by another program")
                return
            await self._write(batch)
            await self._on_disk(spool.acknowledge, len(batch))

    async def _write(self, batch: Sequence[PricedUsage]) -> None:
        try:
            new = await self._writer.write(batch)
        except BadRecordError as error:
            if len(batch) == 1:
                self._lose(1, f"the database refuses request {batch[0].usage.request_id} ({error})")
                return
            # One wrong record does not cost the others.
            middle = len(batch) // 2
            await self._write(batch[:middle])
            await self._write(batch[middle:])
            return
        self._recorder.increment(metrics.USAGE_WRITTEN, "written", by=new)
        if new < len(batch):
            self._recorder.increment(metrics.USAGE_WRITTEN, "duplicate", by=len(batch) - new)
        self._note_back()

    async def _look_after(self) -> None:
        """Now and then: spools of processes that died, and what the writer has to do."""
        now = asyncio.get_running_loop().time()
        if now < self._housekeeping_at:
            return
        self._housekeeping_at = now + HOUSEKEEPING_INTERVAL_S
        self._loss_logged = False
        while self._spools is not None and self._spool is not None:
            self._adopted = self._adopted or await self._on_disk(self._spools.adopt)
            if self._adopted is None:
                break
            await self._drain_spool(self._adopted)
            await self._on_disk(self._adopted.close)
            self._adopted = None
        await self._writer.housekeeping()

    # ---- outcomes ----

    async def _keep_the_rest(self) -> None:
        if self._memory and self._spool is not None:
            try:
                taken = await self._on_disk(self._spool.append, list(self._memory))
            except OSError as error:
                self._note_disk_failure(error)
            else:
                for _ in range(taken):
                    self._memory.popleft()
        if self._memory:
            self._lose(len(self._memory), "the database is away and no spool file takes them")
            self._memory.clear()
        for spool in (self._spool, self._adopted):
            if spool is None:
                continue
            if len(spool):
                logger.warning("%d usage records stay in %s until a server starts", len(spool), spool.path)
            try:
                await self._on_disk(spool.close)
            except OSError as error:
                self._note_disk_failure(error)
        self._spool = self._adopted = None

    def _note_away(self, error: Exception) -> None:
        self._recorder.increment(metrics.STORE_ERRORS, STORE, PURPOSE)
        if not self._away:
            self._away = True
            self._recorder.set(metrics.STORE_UP, 0, STORE)
            logger.error("usage cannot be written to the database (%s); it is kept until the database is back", error)

    def _note_back(self) -> None:
        if self._away:
            self._away = self._loss_logged = False
            self._recorder.set(metrics.STORE_UP, 1, STORE)
            logger.warning("usage is written to the database again; %d records were kept for it", self.pending)

    def _note_disk_failure(self, error: OSError) -> None:
        if not self._disk_failed:
            self._disk_failed = True
            logger.error(
                "the spool file of usage cannot be written (%s); a killed process may lose more than a second of it",
                error,
            )

    def _lose(self, count: int, reason: str) -> None:
        self._recorder.increment(metrics.USAGE_WRITTEN, "lost", by=count)
        if not self._loss_logged:
            self._loss_logged = True
            logger.error("usage records are lost: %s; penstock_usage_records_total counts all of them", reason)

    async def _on_disk(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function, *arguments)


async def _pause(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event or so many seconds."""
    # Not `wait_for`: until Python 3.12 it can swallow a cancellation that comes together with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
