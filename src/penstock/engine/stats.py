"""Counters of an engine; the frontend and /metrics see them as core.types.EngineStats."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.telemetry.histogram import Histogram
from penstock.telemetry.metrics import STEP_PHASES, STEP_SECONDS_BUCKETS, STEP_TOKENS_BUCKETS


@dataclass(slots=True)
class Counters:
    """What has happened since the engine started. `finished` counts samples by finish reason; `phase_seconds` adds up the time in each of
    STEP_PHASES. `device_seconds`: what steps took on an accelerator; `device_idle_seconds`: how long it waited between two steps while
    there was work."""

    steps: int = 0
    step_failures: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    device_seconds: float = 0.0
    device_idle_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS_BUCKETS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS_BUCKETS))
    phase_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEP_PHASES, 0.0))
