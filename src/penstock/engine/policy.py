"""All ordering: who is admitted first, who makes room for whom. Two policies are here, the third (shares of tenants) in fairness.py.

Priority ages: a waiting request gains one level every AGEING_S seconds, so that nothing waits for ever. As every waiting request ages
at the same pace, two of them never change their order:

    level at time t:  priority − (t − arrival) / AGEING_S      →      order by  arrival + priority · AGEING_S

which makes an aged priority a key that a heap can keep.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.errors import ConfigError
from penstock.engine.request import Request, RequestStatus

SortKey = tuple[float, ...]

AGEING_S = 10.0
# Priorities outside of ±MAX_PRIORITY count as that, so that the longest time in which one request overtakes another is known.
MAX_PRIORITY = 32


@dataclass(frozen=True, slots=True)
class Room:
    """What running requests share: places and tokens of a step, and KV blocks."""

    slots: int
    tokens: int
    blocks: int


class Policy(Protocol):
    """Keeps the waiting requests in order and says who makes room. Keys are unique and do not change while a request is in the engine;
    the scheduler keeps running requests sorted by them."""

    def key(self, request: Request) -> SortKey: ...

    def arrived(self, request: Request) -> None:
        """A request is in the engine from now on, waiting or not."""
        ...

    def departed(self, request: Request) -> None:
        """It has ended."""
        ...

    def push(self, request: Request) -> None:
        """Let a request wait; sets its status."""
        ...

    def discard(self, request: Request) -> None:
        """Count out a WAITING request; the caller changes its status next."""
        ...

    def heads(self) -> list[Request]:
        """Waiting requests to admit next, best first: one, or the first of a few tenants."""
        ...

    def num_waiting_of(self, tenant: str) -> int:
        """How much of the queue is the tenant's; 0 where tenants are all one."""
        ...

    def arrange(self, running: list[Request]) -> list[Request]:
        """Running requests, given in order of their keys, in the order in which they get tokens when there are not enough for all."""
        ...

    def precedes(self, waiting: Request, running: Request) -> bool:
        """Whether the waiting request's prompt is computed before the rest of the running one's."""
        ...

    def victim(self, running: Sequence[Request]) -> Request:
        """Who loses its blocks when running requests have outgrown the cache."""
        ...

    def displaceable(
        self, request: Request, num_blocks: int, running: Sequence[Request], room: Room
    ) -> Iterator[Request]:
        """Running requests to preempt so that `request`, which will hold `num_blocks`, can run; each given that those before it go."""
        ...

    def charge(self, scheduled: Mapping[Request, int]) -> None:
        """These requests are about to have so many more tokens computed than now."""
        ...


class FirstComeFirstServed:
    """Arrival order. A request that runs is never displaced by one that waits."""

    def __init__(self) -> None:
        self._waiting = WaitingHeap()

    def key(self, request: Request) -> SortKey:
        return (request.order,)

    def arrived(self, request: Request) -> None:
        """Nothing to note."""

    def departed(self, request: Request) -> None:
        """Nothing to note."""

    def push(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self._waiting.push(self.key(request), request)

    def discard(self, request: Request) -> None:
        self._waiting.discard(request)

    def heads(self) -> list[Request]:
        first = self._waiting.first()
        return [] if first is None else [first]

    def num_waiting_of(self, tenant: str) -> int:
        return 0

    def arrange(self, running: list[Request]) -> list[Request]:
        return running

    def precedes(self, waiting: Request, running: Request) -> bool:
        return False

    def victim(self, running: Sequence[Request]) -> Request:
        return running[-1]

    def displaceable(
        self, request: Request, num_blocks: int, running: Sequence[Request], room: Room
    ) -> Iterator[Request]:
        return iter(())

    def charge(self, scheduled: Mapping[Request, int]) -> None:
        """Nobody is charged."""


class PriorityFirst(FirstComeFirstServed):
    """Lower `priority` first, with ageing, then arrival order. A strictly more urgent request displaces the least urgent running ones."""

    def key(self, request: Request) -> SortKey:
        return aged_key(request)

    def precedes(self, waiting: Request, running: Request) -> bool:
        return more_urgent(waiting, running)

    def displaceable(
        self, request: Request, num_blocks: int, running: Sequence[Request], room: Room
    ) -> Iterator[Request]:
        for victim in reversed(running):
            if not more_urgent(request, victim):
                return
            yield victim


def aged_key(request: Request) -> SortKey:
    """Priority with ageing as a key that does not change with time, then arrival order."""
    priority = min(max(request.priority, -MAX_PRIORITY), MAX_PRIORITY)
    return (request.arrival_time + priority * AGEING_S, request.order)


def more_urgent(waiting: Request, running: Request) -> bool:
    """Of a better priority, which the other one has not made up for by age."""
    return waiting.priority < running.priority and aged_key(waiting) < aged_key(running)


def make_policy(name: str) -> Policy:
    """The policy called `name`. Raises ConfigError listing the known ones."""
    from penstock.engine.fairness import FairShares

    policies: dict[str, type[FairShares] | type[FirstComeFirstServed]] = {
        "fair": FairShares,
        "priority": PriorityFirst,
        "fcfs": FirstComeFirstServed,
    }
    if name not in policies:
        raise ConfigError(f"--scheduling-policy must be one of {', '.join(policies)}, not {name!r}.")
    return policies[name]()


class WaitingHeap:
    """Requests by key. Removal is lazy: whoever is no longer WAITING is skipped."""

    def __init__(self) -> None:
        self._heap: list[tuple[SortKey, int, Request]] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, key: SortKey, request: Request) -> None:
        heapq.heappush(self._heap, (key, request.epoch, request))
        self._length += 1

    def first(self) -> Request | None:
        while self._heap:
            if self._is_current(self._heap[0]):
                return self._heap[0][2]
            heapq.heappop(self._heap)
        return None

    def discard(self, request: Request) -> None:
        """Count out a WAITING request; the caller changes its status next."""
        self._length -= 1
        if len(self._heap) > 2 * self._length + 64:
            self._heap = [e for e in self._heap if e[2] is not request and self._is_current(e)]
            heapq.heapify(self._heap)

    @staticmethod
    def _is_current(entry: tuple[SortKey, int, Request]) -> bool:
        _, epoch, request = entry
        return request.status is RequestStatus.WAITING and epoch == request.epoch
