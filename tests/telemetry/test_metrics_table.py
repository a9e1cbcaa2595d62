"""The table of metrics: conventions, the recorder's bounds, the exported text, and the page made from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.types import EngineStats, LiveLimits
from penstock.telemetry import metrics as m
from penstock.telemetry.docs import metrics_page
from penstock.telemetry.exporter import EngineSample, render
from penstock.telemetry.histogram import Histogram, cumulative
from penstock.telemetry.recorder import MAX_SERIES, OTHER, Recorder

ROOT = Path(__file__).parents[2]


def exported(recorder: Recorder, *engines: EngineSample) -> dict[str, float]:
    """Sample (name and labels as in the text) → value."""
    text = render(recorder, engines).decode()
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("metric", m.METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: m.Metric) -> None:
    assert re.fullmatch("penstock_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not re.search("_(ms|milliseconds|kb|mb|percent)(_|$)", metric.name)
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_names_are_unique() -> None:
    assert len({metric.name for metric in m.METRICS}) == len(m.METRICS)


def test_histogram_bounds_are_inclusive() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.observe(value)
    histogram.observe(2, count=10)
    assert histogram.counts == [2, 12, 1]
    assert histogram.sum == pytest.approx(28)
    assert cumulative(histogram.bounds, histogram.counts) == [("1.0", 2), ("2.0", 14), ("+Inf", 15)]


def test_histogram_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match="zip"):
        cumulative((1, 2), [1, 2])


def test_counters_gauges_and_histograms_are_exported() -> None:
    recorder = Recorder()
    recorder.increment(m.REQUESTS, "llama", "completed")
    recorder.increment(m.REQUESTS, "llama", "completed", by=2)
    recorder.set(m.HTTP_IN_FLIGHT, 4)
    recorder.observe(m.TIME_TO_FIRST_TOKEN, 0.02, "llama")
    samples = exported(recorder)
    assert samples["penstock_requests_total model=llama outcome=completed"] == 3
    assert samples["penstock_http_requests_in_flight"] == 4
    assert samples["penstock_time_to_first_token_seconds_bucket le=0.01 model=llama"] == 0
    assert samples["penstock_time_to_first_token_seconds_bucket le=0.025 model=llama"] == 1
    assert samples["penstock_time_to_first_token_seconds_bucket le=+Inf model=llama"] == 1
    assert samples["penstock_time_to_first_token_seconds_sum model=llama"] == pytest.approx(0.02)


def test_every_metric_appears_with_help_and_type() -> None:
    text = render(Recorder()).decode()
    for metric in m.METRICS:
        assert f"# HELP {metric.name} {metric.help}" in text
        assert f"# TYPE {metric.name} {metric.kind}" in text


def test_label_values_cannot_grow_without_bound() -> None:
    recorder = Recorder()
    for number in range(MAX_SERIES + 100):
        recorder.increment(m.HTTP_REQUESTS, f"/r{number}", "GET", "2xx")
    assert len(list(recorder.values(m.HTTP_REQUESTS))) == MAX_SERIES + 1
    assert recorder.value(m.HTTP_REQUESTS, OTHER, OTHER, OTHER) == 100


def test_a_wrong_number_of_labels_is_an_error() -> None:
    with pytest.raises(ValueError, match="penstock_requests_total"):
        Recorder().increment(m.REQUESTS, "llama")


def test_engine_snapshot_is_exported() -> None:
    stats = EngineStats(
        uptime_s=3.5,
        steps=10,
        running=2,
        waiting=1,
        kv_blocks_total=200,
        kv_blocks_used=50,
        kv_blocks_cached=7,
        preemptions=4,
        draft_tokens=30,
        accepted_draft_tokens=21,
        verifications=10,
        finished={"stop": 5, "length": 6},
        step_phase_seconds={"schedule": 0.25, "forward": 3.0},
        step_seconds_sum=0.5,
        step_seconds_buckets=[1] * (len(m.STEP_SECONDS_BUCKETS) + 1),
        limits=LiveLimits(max_num_seqs=64),
    )
    samples = exported(
        Recorder(), EngineSample("a", True, 2, stats), EngineSample("b", ready=False, restarts=0, stats=None)
    )
    assert samples["penstock_engine_ready model=a"] == 1
    assert samples["penstock_engine_ready model=b"] == 0
    assert samples["penstock_engine_restarts_total model=a"] == 2
    assert samples["penstock_engine_requests_running model=a"] == 2
    assert samples["penstock_engine_kv_usage_ratio model=a"] == 0.25
    assert samples["penstock_engine_preemptions_total model=a"] == 4
    assert samples["penstock_engine_draft_tokens_total model=a"] == 30
    assert samples["penstock_engine_accepted_draft_tokens_total model=a"] == 21
    assert samples["penstock_engine_verifications_total model=a"] == 10
    assert samples["penstock_engine_finished_samples_total model=a reason=length"] == 6
    assert samples["penstock_engine_limit model=a name=max_num_seqs"] == 64
    assert samples["penstock_engine_step_phase_seconds_total model=a phase=schedule"] == 0.25
    assert samples["penstock_engine_step_seconds_count model=a"] == len(m.STEP_SECONDS_BUCKETS) + 1
    assert "penstock_engine_uptime_seconds model=b" not in samples


def test_labels_are_escaped() -> None:
    recorder = Recorder()
    recorder.increment(m.REQUESTS_IN_FLIGHT, 'evil"\n} 1')
    assert exported(recorder)['penstock_requests_in_flight model=evil"\n} 1'] == 1


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == metrics_page(), "run: python -m penstock.telemetry.docs > docs/metrics.md"
