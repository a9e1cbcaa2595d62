"""The connection to one engine: messages there and back, signs of life, and what must not get lost when a queue is full."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.errors import EngineDeadError, OverloadedError, error_from_info
from penstock.core.transport import ClientEndpoint
from penstock.core.types import (
    CLIENT_TIMEOUT_S,
    Abort,
    Configure,
    Configured,
    Deltas,
    Disconnect,
    EngineRequest,
    EngineStats,
    FromEngine,
    Hello,
    LiveLimits,
    Ping,
    StartupFailed,
    Status,
    Submit,
    TokenDelta,
)
from penstock.serving.frontend.progress import ProgressWatch

logger = logging.getLogger(__name__)

CONFIGURE_TIMEOUT_S = 30.0
# A client that says nothing for CLIENT_TIMEOUT_S is dropped by the engine, together with its requests and without a word.
PAUSE_LIMIT_S = 0.8 * CLIENT_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class LinkEvents:
    """What a link tells its owner.

    `tokens`: one delta. `hang`: no progress for too long (once). `paused`: this process stood still for so long that the engine may have
    dropped its requests. `busy`: asked for; has the engine work from us?
    """

    tokens: Callable[[TokenDelta], None]
    hang: Callable[[str], None]
    paused: Callable[[], None]
    busy: Callable[[], bool]


class EngineLink:
    """One engine from its Hello to its end. Owns `endpoint`. Make it inside the event loop; `close` ends it.

    `stats` is the latest snapshot, None before the first.
    """

    def __init__(
        self,
        endpoint: ClientEndpoint,
        events: LinkEvents,
        *,
        ping_interval_s: float,
        hang_timeout_s: float,
        pause_limit_s: float = PAUSE_LIMIT_S,
    ) -> None:
        self.stats: EngineStats | None = None
        self.hung = False
        self._endpoint = endpoint
        self._events = events
        self._ping_interval_s = ping_interval_s
        self._pause_limit_s = pause_limit_s
        self._watch = ProgressWatch(tick_s=ping_interval_s, hang_timeout_s=hang_timeout_s)
        self._call_ids = itertools.count()
        self._calls: dict[int, asyncio.Future[LiveLimits]] = {}
        self._unsent_aborts: list[Abort] = []
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._tick())]

    @property
    def silent_s(self) -> float:
        """Seconds without progress."""
        return self._watch.silent_s

    def submit(self, request: EngineRequest, *, first: bool) -> None:
        """Hand over a request; `first`: the engine had no work from us before. Raises OverloadedError when the queue is full."""
        if first:
            self._watch.progressed()
        self._endpoint.send(Submit(request))

    def abort(self, abort: Abort) -> None:
        """Send, or keep for later when the queue is full, so that no request runs on for nobody."""
        try:
            self._endpoint.send(abort)
        except OverloadedError:
            self._unsent_aborts.append(abort)

    async def configure(self, limits: LiveLimits) -> LiveLimits:
        """Change limits. Raises InvalidRequestError, EngineDeadError when no answer comes, OverloadedError."""
        call_id = next(self._call_ids)
        call: asyncio.Future[LiveLimits] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = call
        try:
            self._endpoint.send(Configure(call_id, limits))
            async with asyncio.timeout(CONFIGURE_TIMEOUT_S):
                return await call
        except TimeoutError as error:
            raise EngineDeadError("The engine did not answer.") from error
        finally:
            self._calls.pop(call_id, None)

    def restore_limits(self, limits: LiveLimits) -> None:
        """Set limits that the engine's predecessor had, without waiting for the answer."""
        self._say(Configure(next(self._call_ids), limits))

    def close(self) -> list[asyncio.Task[None]]:
        """Leave the engine. Returns the cancelled tasks, for those who want to wait for their end."""
        self._say(Disconnect())
        for task in self._tasks:
            task.cancel()
        for call in self._calls.values():
            if not call.done():
                call.set_exception(EngineDeadError("The engine stopped before it changed its limits."))
        self._endpoint.close()
        return self._tasks

    async def _read(self) -> None:
        while True:
            self._handle(await self._endpoint.receive())

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Deltas(deltas):
                if deltas:
                    self._watch.progressed()
                for delta in deltas:
                    self._events.tokens(delta)
            case Status(stats):
                self.stats = stats
                self._watch.status(stats, busy=self._events.busy())
            case Configured(call_id, limits, error):
                call = self._calls.pop(call_id, None)
                if call is None or call.done():
                    return
                if error is None:
                    call.set_result(limits)
                else:
                    call.set_exception(error_from_info(error))
            case Hello() | StartupFailed():
                logger.debug("ignored a late %s", type(message).__name__)

    async def _tick(self) -> None:
        """Say that we are alive, and notice when the engine is not."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            if loop.time() - last > self._pause_limit_s:
                self._events.paused()
            last = loop.time()
            self._say(Ping())
            aborts, self._unsent_aborts = self._unsent_aborts, []
            for abort in aborts:
                self.abort(abort)
            self._watch.tick(last)
            if self._watch.hung and not self.hung:
                self.hung = True
                reason = f"the engine made no progress for {self._watch.silent_s:.0f} s"
                logger.error("%s", reason)
                self._events.hang(reason)
            await asyncio.sleep(self._ping_interval_s)

    def _say(self, message: Configure | Ping | Disconnect) -> None:
        """Send what may as well be lost when the queue is full."""
        with contextlib.suppress(OverloadedError):
            self._endpoint.send(message)
