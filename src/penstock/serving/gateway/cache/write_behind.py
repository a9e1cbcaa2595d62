"""Writes answers to a store after their requests have gone: a bounded queue and one task.

put_nowait ─▶ waiting (count and bytes bounded; what does not fit is dropped and counted) ─▶ task ─▶ store.put
     └──────▶ fresh: what this process completed in the last seconds, for `peek`
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from penstock.serving.gateway.cache.interface import CacheStore, Entry
from penstock.serving.gateway.cache.memory_store import entry_size
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

# Longer than a request takes from its look-up to the moment when it would begin a generation.
FRESH_S = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    entry: Entry
    ttl_s: float
    size: int
    completed_at: float
    written: asyncio.Event


class WriteBehind:
    """In front of a slow CacheStore. Used from one event loop. `clock`: monotonic seconds. Owns `store` and closes it."""

    def __init__(
        self,
        store: CacheStore,
        recorder: Recorder,
        *,
        max_waiting: int = 1024,
        max_bytes: int = 64 * 1024 * 1024,
        drain_timeout_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._recorder = recorder
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock
        self._waiting: OrderedDict[str, _Answer] = OrderedDict()
        self._waiting_bytes = 0
        self._fresh: OrderedDict[str, _Answer] = OrderedDict()
        self._fresh_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def peek(self, key: str) -> Entry | None:
        """An answer that this process completed just now, written or not."""
        self._forget_fresh()
        answer = self._fresh.get(key)
        return None if answer is None else answer.entry

    async def get(self, key: str) -> Entry | None:
        waiting = self._waiting.get(key)
        return await self._store.get(key) if waiting is None else waiting.entry

    def put_nowait(self, key: str, entry: Entry, ttl_s: float) -> None:
        """Write soon. A newer answer takes the place of one that waits under the same key."""
        answer = _Answer(entry, ttl_s, entry_size(entry), self._clock(), asyncio.Event())
        self._remember(key, answer)
        if key in self._waiting:
            self._done(key, self._waiting[key])
        full = len(self._waiting) >= self._max_waiting or self._waiting_bytes + answer.size > self._max_bytes
        if full or self._closed:
            self._recorder.increment(metrics.CACHE_DROPPED_WRITES)
            return
        self._waiting[key] = answer
        self._waiting_bytes += answer.size
        if self._task is None:
            self._task = asyncio.create_task(self._write())

    async def put(self, key: str, entry: Entry, ttl_s: float) -> None:
        self.put_nowait(key, entry, ttl_s)

    async def written(self, key: str, timeout_s: float) -> None:
        """Return when the answer that waits under `key` has been written, at the latest after `timeout_s`."""
        answer = self._waiting.get(key)
        if answer is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await answer.written.wait()

    async def close(self) -> None:
        """Write what waits, for a bounded time, then close the store. Idempotent."""
        self._closed = True
        task, self._task = self._task, None
        if task is not None:
            await asyncio.wait({task}, timeout=self._drain_timeout_s)
            task.cancel()
            await asyncio.wait({task})
        if self._waiting:
            logger.warning("%d answers could not be written to the cache in time", len(self._waiting))
            self._recorder.increment(metrics.CACHE_DROPPED_WRITES, by=len(self._waiting))
            self._waiting.clear()
        await self._store.close()

    async def _write(self) -> None:
        while self._waiting:
            key, answer = next(iter(self._waiting.items()))
            try:
                await self._store.put(key, answer.entry, answer.ttl_s)
            except Exception:
                # One answer is not kept; the next ones may be.
                logger.exception("an answer could not be written to the cache")
                self._recorder.increment(metrics.CACHE_DROPPED_WRITES)
            if self._waiting.get(key) is answer:
                self._done(key, answer)
        self._task = None

    def _done(self, key: str, answer: _Answer) -> None:
        del self._waiting[key]
        self._waiting_bytes -= answer.size
        answer.written.set()

    def _remember(self, key: str, answer: _Answer) -> None:
        old = self._fresh.pop(key, None)
        self._fresh_bytes += answer.size - (0 if old is None else old.size)
        self._fresh[key] = answer
        self._forget_fresh()

    def _forget_fresh(self) -> None:
        """The oldest come first."""
        horizon = self._clock() - FRESH_S
        while self._fresh:
            key, answer = next(iter(self._fresh.items()))
            small = len(self._fresh) <= self._max_waiting and self._fresh_bytes <= self._max_bytes
            if small and answer.completed_at > horizon:
                return
            del self._fresh[key]
            self._fresh_bytes -= answer.size
