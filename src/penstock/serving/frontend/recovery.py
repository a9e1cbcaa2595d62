"""Which requests go on after an engine died, and in which order.

A request may kill an engine each time it runs, and nobody can see which one it was. The rule:

1. A crash counts against every request that the dead engine had. With the second one a request ends (code "engine_crashed").
2. Requests that ever showed output are replayed at once; they have proven that they can run.
3. The others (waiting, or in their prompt) are replayed in growing groups of 1, 2, 4, …, the next group when all of the last one have shown
   output or ended. So a request that kills engines in its prompt takes only its own small group and what runs beside it into the
   second crash, not the whole queue: what had not been replayed yet has still one crash only.

So one such request costs at most two engines. New requests are not held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from penstock.core.errors import EngineError
from penstock.serving.frontend.request_state import RequestState

MAX_CRASHES = 2


def crashed_too_often() -> EngineError:
    """The outcome of a request that was in too many crashes."""
    return EngineError(
        "The engine crashed twice while it had this request, so it is not tried again.", code="engine_crashed"
    )


class ReplayQueue:
    """The requests that wait for their replay."""

    def __init__(self) -> None:
        self._waiting: deque[RequestState] = deque()
        self._group: set[str] = set()
        self._group_size = 1

    def restart(self, states: Iterable[RequestState]) -> list[RequestState]:
        """A new engine is there: all unfinished requests in, those to submit now out. Forgets an earlier replay."""
        states = list(states)
        self._waiting = deque(state for state in states if not state.started)
        self._group = set()
        self._group_size = 1
        return [state for state in states if state.started] + self._next_group()

    def settled(self, request_id: str) -> list[RequestState]:
        """A request showed output or ended; the requests to submit now."""
        if request_id not in self._group:
            return []
        self._group.discard(request_id)
        return [] if self._group else self._next_group()

    def _next_group(self) -> list[RequestState]:
        group: list[RequestState] = []
        while self._waiting and len(group) < self._group_size:
            state = self._waiting.popleft()
            if not state.mailbox.closed:
                group.append(state)
        self._group_size *= 2
        self._group = {state.request_id for state in group}
        return group
