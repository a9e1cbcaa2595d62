"""Things that end at a time, if they are not over before."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Deadlines(Generic[Key]):
    """Times by key. Asking is one comparison until a time has passed; only then are all looked at."""

    def __init__(self) -> None:
        self._times: dict[Key, float] = {}
        self._next = math.inf

    def __len__(self) -> int:
        return len(self._times)

    def set(self, key: Key, at: float) -> None:
        self._times[key] = at
        self._next = min(self._next, at)

    def drop(self, key: Key) -> None:
        """Forget a key; unknown ones are ignored."""
        self._times.pop(key, None)

    def take_passed(self, now: float) -> list[Key]:
        """The keys whose time has come, in the order in which they were set; they are forgotten."""
        if now < self._next:
            return []
        passed = [key for key, at in self._times.items() if at <= now]
        for key in passed:
            del self._times[key]
        self._next = min(self._times.values(), default=math.inf)
        return passed
