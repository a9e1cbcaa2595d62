"""Answers in this process: bounded in bytes, least recently used first out, and gone when their time is over.

    entries:  key ─▶ slot, from the least to the most recently used      ─▶ evicted from the left while there are too many bytes
    expiring: second ─▶ keys whose time is over by then                  ─▶ a timer takes what is due, whether anybody asks or not

Every operation is O(1), except that the timer works once for each answer.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.serving.frontend.client import Delta, TokenLogprob
from penstock.serving.gateway.cache.interface import Entry
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

# An answer above this part of the bound would push too many others out.
LARGEST_PART = 8
_SWEEP_INTERVAL_S = 1.0

# Measured sizes of CPython 3.11 objects, on the high side.
_ENTRY_BYTES = 600
_DELTA_BYTES = 300
_TOKEN_ID_BYTES = 9 + 32
_LOGPROB_BYTES = 400
_ALTERNATIVE_BYTES = 300


def entry_size(entry: Entry) -> int:
    """Bytes of memory that an entry takes, estimated from above without a visit to every object."""
    return _ENTRY_BYTES + sum(_delta_size(delta) for _, delta in entry.news)


def _delta_size(delta: Delta) -> int:
    size = _DELTA_BYTES + sys.getsizeof(delta.text) + _TOKEN_ID_BYTES * len(delta.token_ids)
    size += _TOKEN_ID_BYTES * len(delta.prompt_token_ids or ())
    if isinstance(delta.stop_reason, str):
        size += sys.getsizeof(delta.stop_reason)
    return size + _logprobs_size(delta.logprobs or ()) + _logprobs_size(delta.prompt_logprobs or ())


def _logprobs_size(logprobs: Sequence[TokenLogprob]) -> int:
    return sum(_LOGPROB_BYTES + _ALTERNATIVE_BYTES * len(logprob.top) for logprob in logprobs)


@dataclass(slots=True)
class _Slot:
    entry: Entry
    size: int
    expires_at: float


class MemoryStore:
    """A CacheStore of at most `max_bytes`. Used from one event loop. `clock`: monotonic seconds."""

    def __init__(self, max_bytes: int, recorder: Recorder, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._recorder = recorder
        self._clock = clock
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        # Keys in the order of insertion; the values mean nothing.
        self._expiring: dict[int, dict[str, None]] = {}
        self._swept_until = 0
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._report()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def size(self) -> int:
        """The estimated size of all that is kept."""
        return self._size

    def peek(self, key: str) -> Entry | None:
        """`get` without waiting."""
        slot = self._slots.get(key)
        if slot is None:
            return None
        if slot.expires_at <= self._clock():
            self._drop(key, "expired")
            return None
        self._slots.move_to_end(key)
        return slot.entry

    async def get(self, key: str) -> Entry | None:
        return self.peek(key)

    def put_nowait(self, key: str, entry: Entry, ttl_s: float) -> None:
        """Keep an answer unless it is too large; an older one of the same key goes in either case."""
        if key in self._slots:
            self._drop(key, None)
        size = entry_size(entry)
        if size > self._max_bytes // LARGEST_PART or not ttl_s > 0:
            return
        self.expire()
        expires_at = self._clock() + ttl_s
        self._slots[key] = _Slot(entry, size, expires_at)
        self._expiring.setdefault(math.ceil(expires_at), {})[key] = None
        self._size += size
        while self._size > self._max_bytes:
            self._drop(next(iter(self._slots)), "size")
        self._report()
        self._arm()

    async def put(self, key: str, entry: Entry, ttl_s: float) -> None:
        self.put_nowait(key, entry, ttl_s)

    def expire(self) -> None:
        """Drop what is over."""
        now = math.floor(self._clock())
        if not self._slots:
            self._swept_until = now
            return
        seconds: Sequence[int] = range(self._swept_until + 1, now + 1)
        if len(seconds) > len(self._expiring):
            # The machine slept.
            seconds = [second for second in self._expiring if second <= now]
        for second in seconds:
            for key in list(self._expiring.get(second, ())):
                self._drop(key, "expired")
        self._swept_until = now

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._slots.clear()
        self._expiring.clear()
        self._size = 0
        self._report()

    def _drop(self, key: str, reason: Literal["size", "expired"] | None) -> None:
        slot = self._slots.pop(key)
        self._size -= slot.size
        second = math.ceil(slot.expires_at)
        keys = self._expiring[second]
        del keys[key]
        if not keys:
            del self._expiring[second]
        if reason is not None:
            self._recorder.increment(metrics.CACHE_EVICTIONS, reason)
        self._report()

    def _arm(self) -> None:
        if self._timer is None and self._slots:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP_INTERVAL_S, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        self.expire()
        self._arm()

    def _report(self) -> None:
        self._recorder.set(metrics.CACHE_BYTES, self._size)
        self._recorder.set(metrics.CACHE_ENTRIES, len(self._slots))
