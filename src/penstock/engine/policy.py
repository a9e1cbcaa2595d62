"""All ordering: who is admitted first, who is preempted first."""

from __future__ import annotations

import heapq
from typing import Protocol

from penstock.core.errors import ConfigError
from penstock.engine.request import Request, RequestStatus

SortKey = tuple[int, ...]


class Policy(Protocol):
    """An order of requests, best first. Keys are unique and do not change while a request is queued or runs."""

    def key(self, request: Request) -> SortKey: ...

    def may_displace(self, waiting: Request, running: Request) -> bool:
        """Whether `waiting` is worth preempting `running` for, when there is no room for both."""
        ...


class FirstComeFirstServed:
    """Arrival order. A request that runs is never displaced by one that waits."""

    def key(self, request: Request) -> SortKey:
        return (request.order,)

    def may_displace(self, waiting: Request, running: Request) -> bool:
        return False


class PriorityFirst:
    """Lower `priority` first, then arrival order. A strictly more urgent request displaces the least urgent running one."""

    def key(self, request: Request) -> SortKey:
        return (request.priority, request.order)

    def may_displace(self, waiting: Request, running: Request) -> bool:
        return waiting.priority < running.priority


def make_policy(name: str) -> Policy:
    """The policy called `name`. Raises ConfigError listing the known ones."""
    policies: dict[str, type[FirstComeFirstServed] | type[PriorityFirst]] = {
        "fcfs": FirstComeFirstServed,
        "priority": PriorityFirst,
    }
    if name not in policies:
        raise ConfigError(f"--scheduling-policy must be one of {', '.join(policies)}, not {name!r}.")
    return policies[name]()


class WaitingQueue:
    """Requests in policy order. Removal is lazy: whoever is no longer WAITING is skipped."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[SortKey, int, Request]] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        heapq.heappush(self._heap, (self._policy.key(request), request.epoch, request))
        self._length += 1

    def peek(self) -> Request | None:
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
