"""When requests are sent.

Open loop: at times drawn beforehand, whatever the server does; a slow server faces a growing number of requests, as it would
with independent users. Latency counts from the scheduled time, so that a generator that falls behind makes figures worse and never
better (no coordinated omission). Closed loop: a fixed number of users, each of whom sends the next request when the last
was answered; it measures throughput at a given concurrency and cannot show queueing.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from penstock.core.errors import ConfigError

Item = TypeVar("Item")
Answer = TypeVar("Answer")
# Sends one item that was due at the given time (of `time.perf_counter`) and returns what came of it; must not raise.
Send = Callable[[Item, float], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Poisson arrivals: independent, exponentially distributed gaps with mean 1/rate seconds. Raises ConfigError."""

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise ConfigError(f"The arrival rate must be above 0 requests per second, not {self.rate}.")

    def times(self, count: int) -> list[float]:
        """Seconds after the start at which each of `count` requests is due; the first is due at once."""
        rng = random.Random(f"{self.seed}/arrivals")  # noqa: S311 - reproducible load, not secrets
        gaps = [0.0, *(rng.expovariate(self.rate) for _ in range(count - 1))]
        return list(itertools.accumulate(gaps[:count]))


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` requests under way at any time, until none is left. Raises ConfigError."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"The concurrency must be at least 1, not {self.concurrency}.")


Arrival = OpenLoop | ClosedLoop


async def drive(arrival: Arrival, items: Sequence[Item], send: Send[Item, Answer]) -> list[Answer]:
    """Send all items as `arrival` says; return the answers in the order of the items."""
    if isinstance(arrival, OpenLoop):
        return await _open_loop(arrival.times(len(items)), items, send)
    return await _closed_loop(arrival.concurrency, items, send)


async def _open_loop(times: Sequence[float], items: Sequence[Item], send: Send[Item, Answer]) -> list[Answer]:
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Answer]] = []
        for offset, item in zip(times, items, strict=True):
            due = start + offset
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(group.create_task(_answer(send, item, due)))
    return [task.result() for task in tasks]


async def _closed_loop(concurrency: int, items: Sequence[Item], send: Send[Item, Answer]) -> list[Answer]:
    answers: list[Answer | None] = [None] * len(items)
    queue = iter(enumerate(items))

    async def user(todo: Iterator[tuple[int, Item]]) -> None:
        for index, item in todo:
            answers[index] = await send(item, time.perf_counter())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(user(queue))
    return [answer for answer in answers if answer is not None]


async def _answer(send: Send[Item, Answer], item: Item, due: float) -> Answer:
    return await send(item, due)
