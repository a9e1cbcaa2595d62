"""Single flight among several gateway processes: one of them generates, the others read its log.

    claim ─ won ──▶ generate, append news to the log (the first at once, then every 25 ms), renew the claim
      │                └─ whole: wait until the answer is kept, then finish ─ failed: finish with the error, or abandon
      └─ lost ─▶ tail the log ─ whole ─▶ done
                   └─ gone (its leader died or left) ─▶ claim … and go on after what has been delivered (see splice)

Without the store (it is away, a log is unreadable) every process generates on its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec

from penstock.core.errors import RequestError, StoreUnavailableError, error_from_info
from penstock.serving.frontend.client import Delta
from penstock.serving.gateway.cache.flight_log import LogReader, Publisher, claim
from penstock.serving.gateway.cache.flights import Flight, Flights, Recheck, Source, Start, generate
from penstock.serving.gateway.cache.interface import FlightStore
from penstock.serving.gateway.cache.splice import Splice

logger = logging.getLogger(__name__)

# Readers of another process come later than those of this one, but not for ever.
SETTLE_S = 1.0
_RETRY_CLAIM_S = 0.01
# Errors that only say that this process cannot go on; others may.
_OF_THIS_PROCESS = (499, 503)

# Waits until the answer under a key has been written, at most so many seconds.
Settle = Callable[[str, float], Awaitable[None]]


class SharedFlights(Flights):
    """Flights that other processes with the same store read along with. Does not own the store."""

    def __init__(self, store: FlightStore, settle: Settle | None = None) -> None:
        super().__init__()
        self._store = store
        self._settle = settle
        self._process = secrets.token_hex(8)
        self._numbers = itertools.count()

    def _source(self, key: str, start: Start, recheck: Recheck | None) -> Source | None:
        if recheck is None:
            return None
        owner = f"{self._process}-{next(self._numbers)}"
        return _SharedGeneration(self._store, key, owner, start, recheck, self._settle).run


class _SharedGeneration:
    """The source of one flight."""

    def __init__(
        self,
        store: FlightStore,
        key: str,
        owner: str,
        start: Start,
        recheck: Recheck,
        settle: Settle | None,
    ) -> None:
        self._store = store
        self._key = key
        self._owner = owner
        self._start = start
        self._recheck = recheck
        self._settle = settle
        self._splice = Splice()

    async def run(self, flight: Flight) -> None:
        """Feed the flight until its answer is whole."""
        try:
            while True:
                claimed = await claim(self._store, self._key, self._owner)
                if claimed:
                    await self._lead(flight)
                    return
                if claimed is False:
                    flight.decide(False)
                    state = await self._follow(flight)
                    if state == "whole":
                        return
                    if state == "gone":
                        await asyncio.sleep(_RETRY_CLAIM_S)
                        continue
                flight.decide(True)
                await self._generate(flight)
                return
        except BaseException:
            # Whatever ended it, the others need not wait until the claim expires.
            await self._abandon()
            raise

    async def _abandon(self) -> None:
        # A store that is away forgets the claim by itself.
        with contextlib.suppress(StoreUnavailableError):
            await self._store.abandon(self._key, self._owner)

    async def _lead(self, flight: Flight) -> None:
        # The leader before this one may have finished between this request's look-up and its claim.
        entry = await self._recheck()
        if entry is not None:
            flight.decide(False)
            self._splice.restart()
            for prompt, delta in entry.news:
                self._pass_on(flight, prompt, delta)
            await self._abandon()
            return
        flight.decide(True)
        publisher = Publisher(self._store, self._key, self._owner)
        try:
            async with publisher:
                await self._generate(flight, publisher)
        except RequestError as error:
            if error.status not in _OF_THIS_PROCESS:
                await publisher.end(error.info)
                await publisher.finish()
            raise
        await flight.complete()
        await publisher.end(None)
        if self._settle is not None:
            await self._settle(self._key, SETTLE_S)
        await publisher.finish()

    async def _generate(self, flight: Flight, publisher: Publisher | None = None) -> None:
        self._splice.restart()

        def hear(prompt: int, delta: Delta) -> None:
            if publisher is not None:
                publisher.add(prompt, delta)
            self._pass_on(flight, prompt, delta)

        await generate(self._start, hear)

    async def _follow(self, flight: Flight) -> Literal["whole", "gone", "unreadable"]:
        """Read the log of whoever leads. Raises the error that the generation ended with."""
        reader = LogReader(self._store, self._key)
        self._splice.restart()
        while True:
            try:
                chunks, state = await reader.read()
            except StoreUnavailableError:
                return "unreadable"
            except (msgspec.DecodeError, UnicodeDecodeError):
                logger.warning("the log of a shared generation cannot be read; generating here")
                return "unreadable"
            if state == "restarted":
                self._splice.restart()
                continue
            for chunk in chunks:
                for prompt, delta in chunk.news:
                    self._pass_on(flight, prompt, delta)
                if chunk.error is not None:
                    raise error_from_info(chunk.error)
                if chunk.done:
                    return "whole"
            if state != "running":
                return "gone"

    def _pass_on(self, flight: Flight, prompt: int, delta: Delta) -> None:
        part = self._splice.new_part(prompt, delta)
        if part is not None:
            flight.accept(prompt, part)
