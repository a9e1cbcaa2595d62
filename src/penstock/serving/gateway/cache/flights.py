"""Single flight: identical requests that run at the same time share one generation.

    open() ─▶ task: generation ─▶ log of news ◀─ position ─ subscription (leader: has a generation, is charged)
                                              ◀─ position ─ subscription (follower: reads along from the beginning)
    first reader leaves ─▶ the next one leads;   last reader leaves ─▶ the generation is aborted
    whole answer ─▶ on_complete(entry), and only then the flight cannot be found any more; a failure goes to all readers

The generation belongs to the flight's own task, not to the request that started it. Readers have positions in one log, so a slow one
holds up nobody. What all readers have taken is folded into one delta per choice, so a log costs about what its answer does; how long that
is, max_tokens and admission bound.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from penstock.core.errors import EngineError, OverloadedError, RequestError
from penstock.serving.frontend.client import Delta
from penstock.serving.gateway.cache.interface import Entry
from penstock.serving.gateway.cache.replay import OnDelta, as_shared, join, make_entry
from penstock.serving.gateway.cache.subscription import Role, Subscription
from penstock.serving.gateway.results import News
from penstock.serving.gateway.streaming.news_stream import NewsStream

logger = logging.getLogger(__name__)

Start = Callable[[OnDelta], NewsStream]
# Keeps a whole answer.
Keep = Callable[[Entry], Awaitable[None]]
# Feeds a flight until its generation is complete; raises the generation's error.
Source = Callable[["Flight"], Awaitable[None]]
# Looks for an answer that was kept after the request had looked.
Recheck = Callable[[], Awaitable[Entry | None]]

_WAIT_S = 60.0
# The log has every delta already when the stream hands it over; the stream only has to be emptied.
_GATHER_S = 0.02
# So many news are folded at once.
FOLD = 512


class Flight:
    """One generation and its readers, the oldest first. Made by `Flights.open`.

    `generates`: this process runs the generation; it may change until `decided` returns, and from False to True when a leader in another
    process is lost. `ended`: nothing more will come; `error` says why when the answer is not complete.
    """

    def __init__(
        self,
        key: str,
        source: Source,
        *,
        generates: bool | None,
        on_end: Callable[[], None],
        on_complete: Keep,
        forget: Callable[[Flight], None],
    ) -> None:
        self.key = key
        self.generates = generates is not False
        self.ended = False
        self.error: RequestError | None = None
        self._on_end = on_end
        self._on_complete = on_complete
        self._forget = forget
        self._log: list[News] = []
        self._shared_log: list[News] = []
        self._folded = 0
        self._head = 0
        self._readers: list[Subscription] = []
        self._deserted = False
        self._decided = asyncio.Event()
        if generates is not None:
            self._decided.set()
        self.task = asyncio.create_task(self._run(source))
        self.task.add_done_callback(self._stopped)

    @property
    def length(self) -> int:
        """How many news there were so far."""
        return self._folded + len(self._log) - self._head

    @property
    def readers(self) -> int:
        """How many requests read this flight."""
        return len(self._readers)

    def news(self, position: int, role: Role) -> list[News]:
        """The news from number `position` on, up to number `length`, as a leader or a follower sees them; from 0 on they may be folded."""
        index = 0 if position == 0 else self._head + position - self._folded
        if role == "leader":
            return self._log[index:]
        self._shared_log += [(prompt, as_shared(delta)) for prompt, delta in self._log[len(self._shared_log) :]]
        return self._shared_log[index:]

    def subscribe(
        self, on_delta: OnDelta, timeout_s: float, on_promoted: Callable[[], None] | None = None
    ) -> Subscription:
        """Read along. To be called in one breath with `find` or `open`, without an await between them; the caller closes what it gets."""
        role: Role = "leader" if self.generates and not self._readers else "follower"
        reader = Subscription(self, role, on_delta, timeout_s, on_promoted)
        self._readers.append(reader)
        return reader

    async def decided(self) -> None:
        """Return when it is known whether this process generates or another does."""
        await self._decided.wait()

    def leave(self, reader: Subscription) -> None:
        """A reader goes: the next one leads, or the generation ends."""
        self._readers.remove(reader)
        if self.ended:
            return
        if self._readers:
            self._assign_roles()
            return
        self._deserted = True
        self._forget(self)
        self.task.cancel()

    async def stopped_if_deserted(self) -> None:
        """Return when the generation has stopped, if nobody reads it any more."""
        if self._deserted:
            await asyncio.wait({self.task})

    async def stop(self) -> None:
        """End the generation; readers get an error unless it is complete. Returns when nothing is left to do."""
        if not self.ended:
            self.task.cancel()
        await asyncio.wait({self.task})

    # ---- for the source ----

    def decide(self, generates: bool) -> None:
        """Say whether this process runs the generation."""
        self.generates = generates
        self._assign_roles()
        self._decided.set()

    def accept(self, prompt: int, delta: Delta) -> None:
        """Append to the log and tell the readers."""
        self._log.append((prompt, delta))
        for reader in self._readers[:]:
            reader.notify()
        if self.length % FOLD == 0:
            self._fold()

    async def complete(self) -> None:
        """The answer is whole: keep it, then let go of the key, so that at any time it is either found here or kept."""
        if self.ended:
            return
        entry = make_entry(self._log, time.time())
        if entry is None:
            raise EngineError("The generation ended before it was complete.")
        try:
            # An answer that was made elsewhere is kept by those who made it.
            if self.generates:
                await self._on_complete(entry)
        except Exception:
            # The readers have their answer, kept or not.
            logger.exception("an answer could not be kept")
        self._end()

    # ---- the task ----

    async def _run(self, source: Source) -> None:
        await source(self)
        await self.complete()

    def _stopped(self, task: asyncio.Task[None]) -> None:
        error: BaseException | None = None
        if task.cancelled():
            error = OverloadedError("The server ended this request before it was complete.")
        elif (failure := task.exception()) is not None:
            error = failure
        if error is not None and not isinstance(error, RequestError):
            logger.error("a shared generation failed unexpectedly", exc_info=error)
            # Without a request's id: this error is for several.
            error = EngineError("The generation failed.", code="internal_error")
        if not self.ended:
            self.error = error
            self._end()

    def _end(self) -> None:
        self.ended = True
        self._forget(self)
        self._decided.set()
        try:
            self._on_end()
        except Exception:
            # Whoever started the generation failed; its readers still have to hear of the end.
            logger.exception("the end of a generation could not be noted")
        for reader in self._readers[:]:
            reader.notify()

    def _fold(self) -> None:
        """Join what every reader has taken. Those that have taken nothing get all in one piece.

        _log:  joined, _head deltas for _folded news | single news …
        """
        until = min([reader.taken for reader in self._readers if reader.taken > 0], default=self.length)
        end = self._head + until - self._folded
        if end > self._head:
            joined = join(self._log[:end])
            self._log[:end] = joined
            self._head = len(joined)
            self._folded = until
            self._shared_log.clear()

    def _assign_roles(self) -> None:
        for place, reader in enumerate(self._readers):
            reader.set_role("leader" if place == 0 and self.generates else "follower")


class Flights:
    """The generations in flight of one process, by key. Used from one event loop.

    A generation must not have a time-out of its own: every reader has one, and without readers it is aborted.
    """

    def __init__(self) -> None:
        self._by_key: dict[str, Flight] = {}
        self._flights: set[Flight] = set()

    def __len__(self) -> int:
        return sum(not flight.ended for flight in self._flights)

    def find(self, key: str) -> Flight | None:
        """The generation to read along with."""
        return self._by_key.get(key)

    def open(
        self,
        key: str,
        start: Start,
        on_end: Callable[[], None],
        on_complete: Keep,
        *,
        recheck: Recheck | None = None,
    ) -> Flight:
        """Begin a generation; from now on it is the one that `find` returns. `start` makes its stream; the stream calls the given function
        with every delta. `on_complete` gets the whole answer unless it came from elsewhere, `on_end` is called once when the generation
        has stopped, however it did. `recheck`: the answer of another process may be used, and this finds one that has been kept in the
        meantime; None: a new generation is wanted.
        """
        source = self._source(key, start, recheck)
        flight = Flight(
            key,
            source or (lambda flight: generate(start, flight.accept)),
            generates=True if source is None else None,
            on_end=on_end,
            on_complete=on_complete,
            forget=self._forget,
        )
        self._by_key[key] = flight
        self._flights.add(flight)
        flight.task.add_done_callback(lambda task: self._flights.discard(flight))
        return flight

    async def close(self) -> None:
        """End all generations."""
        await asyncio.gather(*[flight.stop() for flight in list(self._flights)])

    def _source(self, key: str, start: Start, recheck: Recheck | None) -> Source | None:
        """Where the news may come from instead of a generation here; None: nowhere."""
        return None

    def _forget(self, flight: Flight) -> None:
        if self._by_key.get(flight.key) is flight:
            del self._by_key[flight.key]


async def generate(start: Start, on_delta: OnDelta) -> None:
    """Run a generation to its end. Raises its error."""
    async with start(on_delta) as stream:
        while await stream.wait(_WAIT_S) or not stream.ended:
            await stream.gather(_GATHER_S)
            stream.take()
