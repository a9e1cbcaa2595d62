"""A histogram with fixed upper bounds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts of observations per bucket, and their sum.

    `bounds` are inclusive upper bounds, ascending. `counts` has one entry per bound and a last one for everything above; entries
    are plain counts, not cumulative ones (the exporter accumulates, as the Prometheus text format wants it).
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `value`, `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    @property
    def count(self) -> int:
        return sum(self.counts)


def cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """(upper bound as text, observations at or below it) for the text format; raises ValueError when the lengths do not fit."""
    total = 0
    rows: list[tuple[str, float]] = []
    for bound, count in zip([*bounds, float("inf")], counts, strict=True):
        total += count
        rows.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
    return rows
