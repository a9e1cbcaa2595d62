"""One /metrics page for several processes: each gives a Snapshot of its Recorder, and `merge` makes one Recorder of them all.

Counters and histograms are added. Gauges are added too (requests in flight, bytes held), except those that say the same thing in every
process or where the worst counts: see RULES. Of a process that ended only `retired` is kept: what it counted stays in the sum, so that no
counter ever goes back; what it held is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from penstock.telemetry import metrics as m
from penstock.telemetry.recorder import Recorder

# Gauges that are not added up.
RULES: Mapping[m.Metric, Callable[[float, float], float]] = {
    m.BUILD_INFO: max,
    m.STORE_UP: min,
    m.GATEWAY_WORKERS: max,
}
_BY_NAME = {metric.name: metric for metric in m.METRICS}


class Series(msgspec.Struct, frozen=True, array_like=True):
    """A counter's or gauge's value, or a histogram's counts per bucket and sum (in `value`)."""

    metric: str
    labels: tuple[str, ...]
    value: float
    counts: list[int] | None = None


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """Everything that a process has counted so far."""

    series: list[Series] = []


def snapshot(recorder: Recorder) -> Snapshot:
    """What `recorder` holds now."""
    series: list[Series] = []
    for metric in m.METRICS:
        series += [Series(metric.name, labels, value) for labels, value in recorder.values(metric)]
        series += [
            Series(metric.name, labels, histogram.sum, list(histogram.counts))
            for labels, histogram in recorder.histograms(metric)
        ]
    return Snapshot(series)


def merge(snapshots: Iterable[Snapshot]) -> Recorder:
    """One recorder over all. Series of metrics that this version does not know are left out."""
    merged = Recorder()
    known: set[tuple[str, tuple[str, ...]]] = set()
    for one in snapshots:
        for series in one.series:
            metric = _BY_NAME.get(series.metric)
            if metric is None:
                continue
            rule = RULES.get(metric)
            if series.counts is not None:
                merged.add_counts(metric, series.counts, series.value, *series.labels)
            elif rule is not None and (series.metric, series.labels) in known:
                merged.set(metric, rule(merged.value(metric, *series.labels), series.value), *series.labels)
            else:
                merged.increment(metric, *series.labels, by=series.value)
            known.add((series.metric, series.labels))
    return merged


def retired(snapshots: Iterable[Snapshot]) -> Snapshot:
    """What remains of processes that ended, as one snapshot: counters and histograms."""
    kept = snapshot(merge(snapshots))
    return Snapshot([series for series in kept.series if _BY_NAME[series.metric].kind != "gauge"])
