"""How the one reader of a stream sleeps: until there is news, or only until the end."""

from __future__ import annotations

import asyncio


class NewsWaiter:
    """`sleep` is called by one task, `news` and `end` by whoever brings them."""

    __slots__ = ("_for_end", "_future")

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None
        self._for_end = False

    async def sleep(self, seconds: float, deadline: float, *, for_end: bool) -> None:
        """Sleep until news (or with `for_end` the end), at most `seconds` and not beyond the deadline (of the loop's clock)."""
        loop = asyncio.get_running_loop()
        future = self._future = loop.create_future()
        self._for_end = for_end
        timer = loop.call_at(min(loop.time() + seconds, deadline), self.end)
        try:
            await future
        finally:
            timer.cancel()
            self._future = None
            self._for_end = False

    def news(self) -> None:
        """There is news."""
        if not self._for_end:
            self.end()

    def end(self) -> None:
        """It is over, or the time is."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
