"""Counters of an engine; the frontend and /metrics see them as core.types.EngineStats."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

# Upper bounds; one more bucket counts what is above the last.
STEP_SECONDS_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STEP_TOKENS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(slots=True)
class Histogram:
    """Counts per bucket (not cumulative) and the sum of what was observed."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class Counters:
    """What has happened since the engine started. `finished` counts samples by finish reason."""

    steps: int = 0
    step_failures: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS_BOUNDS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(tuple(map(float, STEP_TOKENS_BOUNDS))))
