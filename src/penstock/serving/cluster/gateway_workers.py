"""Several gateway processes in front of one engine, kept by their parent, which itself serves no request.

    parent ─┬─ engine         (EngineSupervisor)
            ├─ coordinator    shared limits, cache and flights when there is no Redis
            ├─ worker 1 ┐
            └─ worker 2 ┴──── each accepts from the same listening socket and is a client of the engine

The workers inherit one listening socket instead of binding one each (SO_REUSEPORT): a connection that waits in its queue then belongs to no
worker, so that whoever is free takes it and a worker's death loses only the connections that it had accepted.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator

from penstock.serving.cluster.control_channel import (
    Collect,
    Collected,
    EngineGone,
    EngineHung,
    EngineLost,
    EngineReady,
    Hurry,
    LimitsSet,
    Merged,
    Scrape,
    ToChild,
    ToParent,
)
from penstock.serving.cluster.kept_process import KeptProcess, ProcessEvents
from penstock.telemetry import metrics
from penstock.telemetry.aggregate import Snapshot, merge, retired, snapshot
from penstock.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

# A worker that does not answer a scrape for so long is in it with what it said last.
COLLECT_TIMEOUT_S = 1.0

MakeProcess = Callable[[str, ProcessEvents], KeptProcess]


class GatewayWorkers:
    """`workers` processes made by `make_worker`, and one made by `make_coordinator` unless that is None. `on_hang(reason)` has to end the
    engine of now. Make it inside the event loop; `start` before anything else, `stop` at the end."""

    def __init__(
        self,
        workers: int,
        make_worker: MakeProcess,
        make_coordinator: MakeProcess | None,
        *,
        on_hang: Callable[[str], None],
        collect_timeout_s: float = COLLECT_TIMEOUT_S,
    ) -> None:
        self.recorder = Recorder()
        self._on_hang = on_hang
        self._collect_timeout_s = collect_timeout_s
        worker_events = ProcessEvents(self._worker_started, self._heard, self._worker_ended)
        events = ProcessEvents(lambda process: None, self._heard, self._ended)
        self.workers = [make_worker(f"gateway worker {number + 1}", worker_events) for number in range(workers)]
        self.coordinator = None if make_coordinator is None else make_coordinator("the coordinator", events)
        self._retired = Snapshot()
        self._finished_before = 0
        self._engine: EngineReady | EngineLost | EngineGone | None = None
        self._limits: LimitsSet | None = None
        self._starts = 0
        self._stopping = False
        self._collecting: asyncio.Task[Snapshot] | None = None
        self._collect_ids = itertools.count()
        self._missing: dict[int, set[str]] = {}
        self._collected = asyncio.Event()
        self._answers: set[asyncio.Task[None]] = set()

    @property
    def finished_requests(self) -> int:
        """Requests that ended well, over all workers there ever were."""
        return self._finished_before + sum(worker.finished_requests for worker in self.workers)

    async def start(self) -> None:
        """Start the coordinator, then the workers side by side. Raises ConfigError when one does not start."""
        if self.coordinator is not None:
            await self.coordinator.start()
        for outcome in await asyncio.gather(*(worker.start() for worker in self.workers), return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def stop(self, timeout_s: float, *, linger: bool = False, hurry: asyncio.Event | None = None) -> bool:
        """Let the workers finish what runs, for at most `timeout_s` or until `hurry` is set; then the coordinator ends. True when nobody
        had to be killed."""
        self._stopping = True
        hurrying = asyncio.create_task(self._hurry(hurry))
        ended = await asyncio.gather(*(worker.finish(timeout_s, linger=linger) for worker in self.workers))
        hurrying.cancel()
        if self.coordinator is not None:
            ended.append(await self.coordinator.finish(timeout_s))
        for task in self._answers:
            task.cancel()
        await asyncio.gather(hurrying, *self._answers, return_exceptions=True)
        return all(ended)

    async def _hurry(self, hurry: asyncio.Event | None) -> None:
        if hurry is not None:
            await hurry.wait()
            self._tell_workers(Hurry())

    # ---- the engine ----

    def engine_ready(self, address: str) -> None:
        """A new engine listens at `address`."""
        self._starts += 1
        self._tell_engine(EngineReady(address, self._starts))

    def engine_lost(self, reason: str) -> None:
        """The engine died; another will come."""
        self._tell_engine(EngineLost(reason))

    def engine_gone(self, reason: str) -> None:
        """No engine will come."""
        self._tell_engine(EngineGone(reason))

    def _tell_engine(self, state: EngineReady | EngineLost | EngineGone) -> None:
        self._engine = state
        self._tell_workers(state)

    def _tell_workers(self, message: ToChild) -> None:
        for worker in self.workers:
            if worker.serving:
                worker.send(message)

    # ---- the processes ----

    def _worker_started(self, worker: KeptProcess) -> None:
        logger.info("%s (pid %s) serves", worker.name, worker.pid)
        self._count_workers()
        for news in (self._limits, self._engine):
            if news is not None:
                worker.send(news)

    def _worker_ended(self, worker: KeptProcess, last: Snapshot, finished: int) -> None:
        self._finished_before += finished
        self._ended(worker, last, finished)
        self._count_workers()

    def _ended(self, process: KeptProcess, last: Snapshot, finished: int) -> None:
        self._retired = retired([self._retired, last])
        for missing in self._missing.values():
            missing.discard(process.name)
        self._collected.set()
        if not self._stopping:
            self.recorder.increment(metrics.GATEWAY_WORKER_RESTARTS)

    def _count_workers(self) -> None:
        self.recorder.set(metrics.GATEWAY_WORKERS, sum(worker.serving for worker in self.workers))

    def _heard(self, process: KeptProcess, message: ToParent) -> None:
        match message:
            case EngineHung(address, reason):
                # Several workers notice the same hang, and one may tell of an engine that was replaced since.
                if isinstance(self._engine, EngineReady) and self._engine.address == address:
                    self._engine = EngineLost(reason)
                    self._on_hang(reason)
            case LimitsSet():
                self._limits = message
                self._tell_workers(message)
            case Collected(call_id):
                self._missing.get(call_id, set()).discard(process.name)
                self._collected.set()
            case Scrape(call_id):
                task = asyncio.create_task(self._answer_scrape(process, call_id))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)

    # ---- metrics ----

    async def _answer_scrape(self, process: KeptProcess, call_id: int) -> None:
        process.send(Merged(call_id, await self.collect()))

    async def collect(self) -> Snapshot:
        """The metrics of all processes, those that ended included, as one. Calls at the same time share one collection."""
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.create_task(self._collect())
        return await asyncio.shield(self._collecting)

    async def _collect(self) -> Snapshot:
        call_id = next(self._collect_ids)
        serving = [process for process in self._processes() if process.serving]
        missing = self._missing[call_id] = {process.name for process in serving}
        try:
            for process in serving:
                process.send(Collect(call_id))
            async with asyncio.timeout(self._collect_timeout_s):
                while missing:
                    self._collected.clear()
                    await self._collected.wait()
        except TimeoutError:
            logger.warning("no metrics from %s in time; the last ones count", ", ".join(sorted(missing)))
        finally:
            del self._missing[call_id]
        parts = [self._retired, snapshot(self.recorder), *(process.snapshot for process in self._processes())]
        return snapshot(merge(parts))

    def _processes(self) -> Iterator[KeptProcess]:
        yield from self.workers
        if self.coordinator is not None:
            yield self.coordinator
