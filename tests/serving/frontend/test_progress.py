"""When an engine counts as hung."""

from __future__ import annotations

from penstock.core.types import EngineStats
from penstock.serving.frontend.progress import ProgressWatch


def make_stats(steps: int) -> EngineStats:
    return EngineStats(
        uptime_s=1.0, steps=steps, running=1, waiting=0, kv_blocks_total=1, kv_blocks_used=1, kv_blocks_cached=0
    )


def test_answers_without_steps_are_no_progress_while_there_is_work() -> None:
    watch = ProgressWatch(tick_s=1.0, hang_timeout_s=5.0)
    for second in range(6):
        watch.status(make_stats(7), busy=True)
        watch.tick(float(second))
    assert watch.hung


def test_answers_are_enough_without_work() -> None:
    watch = ProgressWatch(tick_s=1.0, hang_timeout_s=5.0)
    for second in range(20):
        watch.status(make_stats(7), busy=False)
        watch.tick(float(second))
    assert not watch.hung


def test_steps_and_tokens_are_progress() -> None:
    watch = ProgressWatch(tick_s=1.0, hang_timeout_s=5.0)
    for second in range(20):
        watch.status(make_stats(second), busy=True)
        watch.tick(float(second))
    assert not watch.hung
    for second in range(20, 24):
        watch.tick(float(second))
    watch.progressed()
    for second in range(24, 28):
        watch.tick(float(second))
    assert not watch.hung


def test_our_own_pause_is_not_the_engines_fault() -> None:
    watch = ProgressWatch(tick_s=1.0, hang_timeout_s=5.0)
    watch.tick(0.0)
    watch.tick(1000.0)
    assert watch.silent_s == 2.0
