"""Renders the recorder and the engines' snapshots in the Prometheus text format.

Imports prometheus_client when first used. https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.core.types import EngineStats
from penstock.telemetry import metrics as m
from penstock.telemetry.histogram import cumulative
from penstock.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from prometheus_client import Metric as Family

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class EngineSample:
    """What is known of one model's engine at the time of a scrape."""

    model: str
    ready: bool
    restarts: int
    stats: EngineStats | None


# Metrics that are one number of EngineStats.
_NUMBERS: tuple[tuple[m.Metric, str], ...] = (
    (m.ENGINE_UPTIME, "uptime_s"),
    (m.ENGINE_STEPS, "steps"),
    (m.ENGINE_STEP_FAILURES, "step_failures"),
    (m.ENGINE_RUNNING, "running"),
    (m.ENGINE_WAITING, "waiting"),
    (m.ENGINE_KV_BLOCKS, "kv_blocks_total"),
    (m.ENGINE_KV_BLOCKS_USED, "kv_blocks_used"),
    (m.ENGINE_KV_BLOCKS_CACHED, "kv_blocks_cached"),
    (m.ENGINE_HOST_BLOCKS, "host_blocks_total"),
    (m.ENGINE_HOST_BLOCKS_USED, "host_blocks_used"),
    (m.ENGINE_PROMPT_TOKENS, "prompt_tokens"),
    (m.ENGINE_GENERATION_TOKENS, "generation_tokens"),
    (m.ENGINE_PREFIX_QUERIED, "prefix_queried_tokens"),
    (m.ENGINE_PREFIX_HIT, "prefix_hit_tokens"),
    (m.ENGINE_PREEMPTIONS, "preemptions"),
    (m.ENGINE_SWAPPED_OUT, "swapped_out_blocks"),
    (m.ENGINE_SWAPPED_IN, "swapped_in_blocks"),
    (m.ENGINE_DEVICE_SECONDS, "device_seconds"),
    (m.ENGINE_DEVICE_IDLE_SECONDS, "device_idle_seconds"),
    (m.ENGINE_DRAFT_TOKENS, "draft_tokens"),
    (m.ENGINE_ACCEPTED_DRAFT_TOKENS, "accepted_draft_tokens"),
    (m.ENGINE_VERIFICATIONS, "verifications"),
    (m.ENGINE_RESIDENT_BYTES, "resident_bytes"),
)
_LIMITS = ("max_num_batched_tokens", "max_num_seqs", "max_prefill_tokens_while_decoding")

# (label values, value) for numbers; (label values, bucket counts, sum) for histograms.
_Number = tuple[tuple[str, ...], float]
_Distribution = tuple[tuple[str, ...], Sequence[int], float]


def render(recorder: Recorder, engines: Sequence[EngineSample] = ()) -> bytes:
    """The page that /metrics answers with."""
    from prometheus_client import generate_latest
    from prometheus_client.registry import Collector, CollectorRegistry

    class _Snapshot(Collector):
        def collect(self) -> Iterable[Family]:
            return _families(recorder, engines)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot())
    return generate_latest(registry)


def _families(recorder: Recorder, engines: Sequence[EngineSample]) -> Iterator[Family]:
    engine_numbers, engine_distributions = _engine_series(engines)
    for metric in m.METRICS:
        if metric.kind == "histogram":
            rows: list[_Distribution] = engine_distributions.get(metric, [])
            if metric.source == "gateway":
                rows = [(labels, histogram.counts, histogram.sum) for labels, histogram in recorder.histograms(metric)]
            yield _distribution_family(metric, rows)
        else:
            numbers = engine_numbers.get(metric, []) if metric.source == "engine" else list(recorder.values(metric))
            yield _number_family(metric, numbers)


def _number_family(metric: m.Metric, rows: Sequence[_Number]) -> Family:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    family_type = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = family_type(metric.name, metric.help, labels=metric.labels)
    for labels, value in rows:
        family.add_metric(labels, value)
    return family


def _distribution_family(metric: m.Metric, rows: Sequence[_Distribution]) -> Family:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, counts, total in rows:
        family.add_metric(labels, cumulative(metric.buckets, counts), total)
    return family


def _engine_series(
    engines: Sequence[EngineSample],
) -> tuple[dict[m.Metric, list[_Number]], dict[m.Metric, list[_Distribution]]]:
    numbers: dict[m.Metric, list[_Number]] = {}
    distributions: dict[m.Metric, list[_Distribution]] = {}
    for engine in engines:
        label = (engine.model,)
        numbers.setdefault(m.ENGINE_READY, []).append((label, float(engine.ready)))
        numbers.setdefault(m.ENGINE_RESTARTS, []).append((label, engine.restarts))
        stats = engine.stats
        if stats is None:
            continue
        for metric, field in _NUMBERS:
            numbers.setdefault(metric, []).append((label, getattr(stats, field)))
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        numbers.setdefault(m.ENGINE_KV_USAGE, []).append((label, usage))
        for reason, count in stats.finished.items():
            numbers.setdefault(m.ENGINE_FINISHED, []).append(((engine.model, reason), count))
        for phase, seconds in stats.step_phase_seconds.items():
            numbers.setdefault(m.ENGINE_STEP_PHASE_SECONDS, []).append(((engine.model, phase), seconds))
        for name in _LIMITS:
            limit = getattr(stats.limits, name)
            if limit is not None:
                numbers.setdefault(m.ENGINE_LIMIT, []).append(((engine.model, name), limit))
        for metric, counts, total in (
            (m.ENGINE_STEP_SECONDS, stats.step_seconds_buckets, stats.step_seconds_sum),
            (m.ENGINE_STEP_TOKENS, stats.step_tokens_buckets, float(stats.step_tokens_sum)),
        ):
            if counts:
                distributions.setdefault(metric, []).append((label, counts, total))
    return numbers, distributions
