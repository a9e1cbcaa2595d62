"""Counts what happens. Plain Python, no exporter, so that every process can afford to import it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from penstock.telemetry.histogram import Histogram
from penstock.telemetry.metrics import Metric

# Series per metric. Label values come from bounded sets; should one grow all the same, the rest shares the series "other".
MAX_SERIES = 512
OTHER = "other"

LabelValues = tuple[str, ...]


class Recorder:
    """The process's counters, gauges and histograms. Used from one thread (the event loop's).

    Label values are given in the order of the metric's `labels`; a wrong number of them is a ValueError.
    """

    def __init__(self) -> None:
        self._values: dict[Metric, dict[LabelValues, float]] = {}
        self._histograms: dict[Metric, dict[LabelValues, Histogram]] = {}

    def increment(self, metric: Metric, *labels: str, by: float = 1) -> None:
        """Add to a counter (or move a gauge)."""
        series = self._values.get(metric)
        if series is None:
            series = self._values[metric] = {}
        elif labels in series:
            series[labels] += by
            return
        key = _series_key(metric, series, labels)
        series[key] = series.get(key, 0) + by

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge."""
        series = self._values.setdefault(metric, {})
        series[_series_key(metric, series, labels)] = value

    def observe(self, metric: Metric, value: float, *labels: str, count: int = 1) -> None:
        """Count `value` in a histogram, `count` times."""
        series = self._histograms.get(metric)
        if series is None:
            series = self._histograms[metric] = {}
        histogram = series.get(labels)
        if histogram is None:
            key = _series_key(metric, series, labels)
            histogram = series.get(key)
            if histogram is None:
                histogram = series[key] = Histogram(metric.buckets)
        histogram.observe(value, count)

    def add_counts(self, metric: Metric, counts: Sequence[int], total: float, *labels: str) -> None:
        """Add another process's histogram: its counts per bucket and the sum of its observations."""
        self.observe(metric, 0.0, *labels, count=0)
        histogram = self._histograms[metric][_series_key(metric, self._histograms[metric], labels)]
        histogram.counts = [mine + theirs for mine, theirs in zip(histogram.counts, counts, strict=True)]
        histogram.sum += total

    def value(self, metric: Metric, *labels: str) -> float:
        """The present value of a counter or gauge, 0 when it never moved."""
        return self._values.get(metric, {}).get(labels, 0)

    def histogram(self, metric: Metric, *labels: str) -> Histogram | None:
        """The histogram of one series, None when nothing was observed."""
        return self._histograms.get(metric, {}).get(labels)

    def values(self, metric: Metric) -> Iterator[tuple[LabelValues, float]]:
        """All series of a counter or gauge."""
        yield from self._values.get(metric, {}).items()

    def histograms(self, metric: Metric) -> Iterator[tuple[LabelValues, Histogram]]:
        """All series of a histogram."""
        yield from self._histograms.get(metric, {}).items()


def _series_key(
    metric: Metric, series: dict[LabelValues, float] | dict[LabelValues, Histogram], labels: Sequence[str]
) -> LabelValues:
    if len(labels) != len(metric.labels):
        raise ValueError(f"{metric.name} has the labels {metric.labels}, not {len(labels)} values.")
    key = tuple(labels)
    if key not in series and len(series) >= MAX_SERIES:
        return (OTHER,) * len(key)
    return key
