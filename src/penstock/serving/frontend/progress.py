"""Notices an engine that hangs."""

from __future__ import annotations

from penstock.core.types import EngineStats


class ProgressWatch:
    """Counts the seconds without a sign of progress.

    With work outstanding, progress is a finished step or new tokens; without, any answer. Time is counted in ticks, and one tick
    counts for at most twice its nominal length: when this process itself was suspended or too busy to tick, the engine is not blamed.
    """

    def __init__(self, *, tick_s: float, hang_timeout_s: float) -> None:
        self._tick_s = tick_s
        self._timeout_s = hang_timeout_s
        self._last_tick: float | None = None
        self._last_steps = -1
        self.silent_s = 0.0

    @property
    def hung(self) -> bool:
        return self.silent_s >= self._timeout_s

    def progressed(self) -> None:
        """Tokens came, or the first work after idleness was handed over."""
        self.silent_s = 0.0

    def status(self, stats: EngineStats, *, busy: bool) -> None:
        """The engine answered. `busy`: it has work from us."""
        if not busy or stats.steps != self._last_steps:
            self.silent_s = 0.0
        self._last_steps = stats.steps

    def tick(self, now: float) -> None:
        """Call every `tick_s` seconds."""
        if self._last_tick is not None:
            self.silent_s += min(now - self._last_tick, 2 * self._tick_s)
        self._last_tick = now
