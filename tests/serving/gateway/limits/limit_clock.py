"""A clock that stands still until a test moves it, and a wait for what happens in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Clock:
    """Seconds. Starts at a time of which nothing divides evenly."""

    def __init__(self, now: float = 1_700_000_000.123457) -> None:
        self._microseconds = round(now * 1e6)

    def __call__(self) -> float:
        return self._microseconds / 1e6

    def advance(self, seconds: float) -> None:
        self._microseconds += round(seconds * 1e6)


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """Wait for something that will happen; TimeoutError when it does not."""
    deadline = asyncio.get_running_loop().time() + within_s
    for _ in iter(condition, True):
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError("it did not happen")
        await asyncio.sleep(0.005)
