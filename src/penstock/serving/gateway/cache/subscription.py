"""One request's view of a generation that several may share."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from penstock.core.errors import DeadlineExceededError
from penstock.serving.frontend.client import Delta
from penstock.serving.gateway.cache.replay import OnDelta, join
from penstock.serving.gateway.results import News
from penstock.serving.gateway.streaming.news_waiter import NewsWaiter

if TYPE_CHECKING:
    from penstock.serving.gateway.cache.flights import Flight

Role = Literal["leader", "follower"]


class Subscription:
    """A NewsStream of one request: all news of a flight from the beginning, with a deadline of its own.

    It takes part from its construction on until it is closed; leaving the block closes it. `on_delta` is called as soon as a delta is there
    (on entering, for those that came before), `on_promoted` when this reader becomes the leader. Whatever they raise ends this
    request only. `taken`: the news up to which it has read. `role` is certain once `Flight.decided` has returned.
    """

    def __init__(
        self, flight: Flight, role: Role, on_delta: OnDelta, timeout_s: float, on_promoted: Callable[[], None] | None
    ) -> None:
        self.role: Role = role
        self._flight = flight
        self._on_delta = on_delta
        self._on_promoted = on_promoted
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._entered = False
        self._closed = False
        self._told = 0
        self.taken = 0
        self._error: Exception | None = None
        self._waiter = NewsWaiter()

    async def __aenter__(self) -> Subscription:
        self._entered = True
        # In one piece: these tokens have no time between them.
        backlog = join(self._flight.news(0, self.role))
        self._told = self._flight.length
        for prompt, delta in backlog:
            self._tell(prompt, delta)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        await self._flight.stopped_if_deserted()

    @property
    def ended(self) -> bool:
        return self._flight.ended or self._error is not None

    async def wait(self, timeout_s: float) -> bool:
        if not self._has_news and not self.ended:
            await self._waiter.sleep(timeout_s, self._deadline, for_end=False)
        if self._error is not None:
            raise self._error
        if self._has_news:
            return True
        if self._flight.error is not None:
            # The same exception for several readers: each begins with a traceback of its own.
            raise self._flight.error.with_traceback(None)
        if not self.ended and asyncio.get_running_loop().time() >= self._deadline:
            raise DeadlineExceededError(f"The request took longer than {self._timeout_s:g} s.")
        return False

    async def gather(self, seconds: float) -> None:
        if seconds > 0 and not self.ended:
            await self._waiter.sleep(seconds, self._deadline, for_end=True)

    def take(self) -> list[News]:
        news = self._flight.news(self.taken, self.role)
        self.taken = self._flight.length
        return news

    def close(self) -> None:
        """Take no further part. Idempotent."""
        if not self._closed:
            self._closed = True
            self._flight.leave(self)

    def set_role(self, role: Role) -> None:
        """The flight says who leads."""
        promoted = role == "leader" and self.role == "follower"
        self.role = role
        if promoted and self._on_promoted is not None:
            self._guarded(self._on_promoted)

    def notify(self) -> None:
        """There is news, or the end."""
        if self._entered and not self._closed:
            news = self._flight.news(self._told, self.role)
            self._told = self._flight.length
            for prompt, delta in news:
                self._tell(prompt, delta)
        if self.ended:
            self._waiter.end()
        else:
            self._waiter.news()

    @property
    def _has_news(self) -> bool:
        return self.taken < self._flight.length

    def _tell(self, prompt: int, delta: Delta) -> None:
        if self._error is None:
            self._guarded(functools.partial(self._on_delta, prompt, delta))

    def _guarded(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        # One reader's fault must not reach the flight, which others read too; this reader's `wait` raises it.
        except Exception as error:
            self._error = error
