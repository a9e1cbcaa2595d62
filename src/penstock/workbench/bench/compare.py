"""Does an interleaved comparison decide anything?

Two conditions are measured in turns (A B, B A, A B, …), so that drift of the machine hits both. Each pair gives one value (a ratio or a
difference); their median is the result, and an order-statistic interval of at least 93 % coverage says how far it can be trusted
(the sign-test interval; for up to eight pairs it is the full range). A claim inside the interval is undecided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Verdict = Literal["yes", "no", "undecided"]
MIN_COVERAGE = 0.93
MIN_PAIRS = 5
Condition = TypeVar("Condition")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of paired values and the interval low..high around it; `pairs` is their number."""

    median: float
    low: float
    high: float
    pairs: int

    def below(self, limit: float) -> Verdict:
        """Is the true median below `limit`? With fewer than five pairs no interval has the coverage, and nothing is decided."""
        if self.pairs < MIN_PAIRS or self.low <= limit <= self.high:
            return "undecided"
        return "yes" if self.high < limit else "no"

    def text(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f}, n={self.pairs})"


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("There are no pairs to compare.")
    ordered = sorted(values)
    trim = _trim(len(ordered))
    return Spread(statistics.median(ordered), ordered[trim], ordered[-1 - trim], len(ordered))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratios of runs that were neighbours in time. Raises ValueError for series of different length."""
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


def paired_difference(minuends: Sequence[float], subtrahends: Sequence[float]) -> Spread:
    """Differences of runs that were neighbours in time. Raises ValueError for series of different length."""
    return spread([left - right for left, right in zip(minuends, subtrahends, strict=True)])


def interleave(conditions: Sequence[Condition], rounds: int) -> Iterator[tuple[int, Condition]]:
    """(round, condition), each round in the opposite order of the one before."""
    for number in range(rounds):
        for condition in conditions if number % 2 == 0 else reversed(conditions):
            yield number, condition


def _trim(count: int) -> int:
    """The most values to drop at each end while the rest still covers the median with MIN_COVERAGE."""
    trim, outside = 0, 2 * 0.5**count
    while True:
        outside += 2 * math.comb(count, trim + 1) * 0.5**count
        if 1 - outside < MIN_COVERAGE or 2 * (trim + 1) >= count:
            return trim
        trim += 1
