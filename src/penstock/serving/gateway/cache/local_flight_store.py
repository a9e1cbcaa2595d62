"""The logs of shared generations in the memory of one process: the coordinator's, for several gateway processes, or a test's."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.serving.gateway.cache.interface import Log

MAX_FLIGHTS = 4096
MAX_BYTES = 256 * 1024 * 1024
_PURGE_INTERVAL_S = 1.0


@dataclass(slots=True, eq=False)
class _Flight:
    """`changed` is replaced whenever it is set: those who wait on the old one look again."""

    owner: str
    expires_at: float
    chunks: list[bytes] = field(default_factory=list)
    size: int = 0
    finished: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class LocalFlightStore:
    """A FlightStore of at most `max_flights` logs and `max_bytes`. Used from one event loop. `clock`: monotonic seconds.

    A store that is full still says who leads, but keeps no log of it: `append` says that the claim is lost, and the leader goes on alone.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_flights: int = MAX_FLIGHTS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._clock = clock
        self._max_flights = max_flights
        self._max_bytes = max_bytes
        self._flights: dict[str, _Flight] = {}
        self._size = 0
        self._purged_at = clock()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def size(self) -> int:
        """The size of all logs."""
        return self._size

    async def claim(self, key: str, owner: str, lease_s: float) -> bool:
        flight = self._live(key)
        if flight is not None and not flight.finished:
            return False
        self._drop(key)
        self._purge()
        if len(self._flights) < self._max_flights:
            self._flights[key] = _Flight(owner, self._clock() + lease_s)
        return True

    async def append(self, key: str, owner: str, chunk: bytes, lease_s: float) -> bool:
        flight = self._owned(key, owner)
        if flight is None:
            return False
        if self._size + len(chunk) > self._max_bytes:
            self._drop(key)
            return False
        flight.expires_at = self._clock() + lease_s
        if chunk:
            self._add(flight, chunk)
        return True

    async def finish(self, key: str, owner: str, chunk: bytes, keep_s: float) -> None:
        flight = self._owned(key, owner)
        if flight is None:
            return
        flight.finished = True
        flight.expires_at = self._clock() + keep_s
        self._add(flight, chunk)

    async def abandon(self, key: str, owner: str) -> None:
        if self._owned(key, owner) is not None:
            self._drop(key)

    async def read(self, key: str, position: int, wait_s: float) -> Log:
        deadline = self._clock() + wait_s
        while True:
            flight = self._live(key)
            if flight is None:
                return Log([], "gone")
            if flight.finished:
                return Log(flight.chunks[position:], "finished")
            now = self._clock()
            if len(flight.chunks) > position or now >= deadline:
                return Log(flight.chunks[position:], "running")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(deadline, flight.expires_at) - now):
                    await flight.changed.wait()

    async def close(self) -> None:
        for key in list(self._flights):
            self._drop(key)

    def _live(self, key: str) -> _Flight | None:
        flight = self._flights.get(key)
        if flight is not None and flight.expires_at <= self._clock():
            self._drop(key)
            return None
        return flight

    def _owned(self, key: str, owner: str) -> _Flight | None:
        flight = self._live(key)
        return flight if flight is not None and flight.owner == owner and not flight.finished else None

    def _add(self, flight: _Flight, chunk: bytes) -> None:
        flight.chunks.append(chunk)
        flight.size += len(chunk)
        self._size += len(chunk)
        flight.notify()

    def _drop(self, key: str) -> None:
        flight = self._flights.pop(key, None)
        if flight is not None:
            self._size -= flight.size
            flight.notify()

    def _purge(self) -> None:
        """Logs whose time is over go even if nobody asks for them."""
        now = self._clock()
        if now - self._purged_at >= _PURGE_INTERVAL_S or len(self._flights) >= self._max_flights:
            self._purged_at = now
            for key in [key for key, flight in self._flights.items() if flight.expires_at <= now]:
                self._drop(key)
