"""Gives back what requests held, behind their answers, and keeps the slots of those that run.

One task does both, in turn: a renewal that overtook a settlement would take the slot of a request that has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque

from penstock.core.errors import StoreUnavailableError
from penstock.serving.gateway.limits.interface import LEASE_S, WINDOW_S, LimitStore, Reservation
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

# Settlements that wait; above it the oldest is dropped, and time frees its slot and its part of the window.
MAX_PENDING = 16_384
# Settlements on their way to the store at once.
SETTLE_BATCH = 32
RENEW_BATCH = 256
RETRY_INTERVAL_S = 0.5


class Settler:
    """Used from one event loop; `start` before, `close` after. While the store is away settlements wait, for as long as they change
    anything: a window."""

    def __init__(self, store: LimitStore, recorder: Recorder, *, lease_s: float = LEASE_S) -> None:
        self._store = store
        self._recorder = recorder
        self._renewal_interval_s = lease_s / 3
        self._held: dict[str, Reservation] = {}
        self._queue: deque[Settlement] = deque()
        self._failed: deque[Settlement] = deque()
        self._retry_at = math.inf
        self._returning: dict[tuple[str, str], Settlement] = {}
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Begin to work. Idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="limits-settler")

    async def close(self) -> None:
        """Settle what waits, once: what the store does not take then is freed by time. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        self._retry_failed()
        await self.flush()

    async def flush(self) -> None:
        """Return when everything that waits has been tried."""
        while self._queue or self._turn.locked():
            await self._settle_batch()

    def hold(self, reservation: Reservation) -> None:
        """Keep the slots of a request until it is settled."""
        self._held[reservation.request_id] = reservation

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """Settle soon."""
        self._held.pop(reservation.request_id, None)
        settlement = Settlement(reservation, tokens, time.monotonic() + WINDOW_S)
        if len(self._queue) + len(self._failed) >= MAX_PENDING:
            self._give_up((self._failed or self._queue).popleft())
        self._queue.append(settlement)
        for key in settlement.slots:
            self._returning[key] = settlement
        self._wake.set()

    def returning(self, reservation: Reservation) -> list[Settlement]:
        """The latest settlements that bring slots back which this reservation may need."""
        if not self._returning:
            return []
        found = (self._returning.get((reservation.tenant, subject.name)) for subject in reservation.subjects)
        return [settlement for settlement in found if settlement is not None]

    async def tell(self, settlements: list[Settlement]) -> None:
        """Return when the store has been told of these and of all before them."""
        for settlement in settlements:
            while not settlement.tried:
                await self._settle_batch()

    async def renew(self) -> None:
        """Keep all slots that are held for another lease."""
        held = list(self._held)
        for start in range(0, len(held), RENEW_BATCH):
            async with self._turn:
                # Those that ended since then are not renewed.
                batch = [self._held[name] for name in held[start : start + RENEW_BATCH] if name in self._held]
                # The store has counted and logged that it is away; the next renewal is in time for a short absence.
                with contextlib.suppress(StoreUnavailableError):
                    await self._store.renew(batch)

    async def _run(self) -> None:
        renew_at = time.monotonic() + self._renewal_interval_s
        while not self._closing:
            if not self._queue:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, min(renew_at, self._retry_at) - time.monotonic())):
                        await self._wake.wait()
            self._wake.clear()
            if time.monotonic() >= self._retry_at:
                self._retry_failed()
            await self._settle_batch()
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + self._renewal_interval_s
                try:
                    await self.renew()
                # A fault in a store must not end the task that frees everybody's slots.
                except Exception:
                    logger.exception("the slots of running requests could not be renewed")

    async def _settle_batch(self) -> None:
        async with self._turn:
            batch = [self._queue.popleft() for _ in range(min(SETTLE_BATCH, len(self._queue)))]
            settling = (self._store.settle(settlement.reservation, settlement.tokens) for settlement in batch)
            results = await asyncio.gather(*settling, return_exceptions=True)
            for settlement, result in zip(batch, results, strict=True):
                self._finish(settlement, result)

    def _finish(self, settlement: Settlement, result: object) -> None:
        self._tell_tried(settlement)
        now = time.monotonic()
        if isinstance(result, StoreUnavailableError) and now < settlement.give_up_at:
            self._failed.append(settlement)
            self._retry_at = min(self._retry_at, now + RETRY_INTERVAL_S)
        elif isinstance(result, StoreUnavailableError):
            self._give_up(settlement)
        elif isinstance(result, BaseException):
            logger.error("a request could not be settled; time frees what it held", exc_info=result)
            self._give_up(settlement)

    def _tell_tried(self, settlement: Settlement) -> None:
        settlement.tried = True
        for key in settlement.slots:
            if self._returning.get(key) is settlement:
                del self._returning[key]

    def _retry_failed(self) -> None:
        self._queue.extend(self._failed)
        self._failed.clear()
        self._retry_at = math.inf

    def _give_up(self, settlement: Settlement) -> None:
        self._tell_tried(settlement)
        self._recorder.increment(metrics.STORE_ERRORS, "limits", "settle")


class Settlement:
    """What is to be told to the store. `slots`: the subjects that get one back. `tried`: the store has been told, or is away."""

    __slots__ = ("give_up_at", "reservation", "slots", "tokens", "tried")

    def __init__(self, reservation: Reservation, tokens: int, give_up_at: float) -> None:
        self.reservation = reservation
        self.tokens = tokens
        self.give_up_at = give_up_at
        self.slots = [
            (reservation.tenant, subject.name) for subject in reservation.subjects if subject.concurrency is not None
        ]
        self.tried = False
