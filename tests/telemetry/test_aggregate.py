"""The metrics of several processes as one page."""

from __future__ import annotations

import msgspec
import pytest

from penstock.telemetry import metrics as m
from penstock.telemetry.aggregate import Series, Snapshot, merge, retired, snapshot
from penstock.telemetry.exporter import render
from penstock.telemetry.recorder import MAX_SERIES, Recorder


def worker(requests: int, in_flight: int, seconds: float, up: float = 1) -> Recorder:
    recorder = Recorder()
    recorder.set(m.BUILD_INFO, 1, "1.0")
    recorder.set(m.STORE_UP, up, "redis")
    recorder.set(m.HTTP_IN_FLIGHT, in_flight)
    recorder.increment(m.REQUESTS, "model", "completed", by=requests)
    recorder.observe(m.TIME_TO_FIRST_TOKEN, seconds, "model", count=requests)
    return recorder


def over_the_wire(recorder: Recorder) -> Snapshot:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot(recorder)), type=Snapshot)


def test_one_snapshot_is_the_recorder() -> None:
    recorder = worker(3, 2, 0.02)
    assert render(merge([over_the_wire(recorder)])) == render(recorder)


def test_counters_and_histograms_add_up_and_gauges_follow_their_rules() -> None:
    merged = merge([over_the_wire(worker(3, 2, 0.02)), over_the_wire(worker(4, 1, 7.0, up=0)), Snapshot()])
    assert merged.value(m.REQUESTS, "model", "completed") == 7
    assert merged.value(m.HTTP_IN_FLIGHT) == 3
    assert merged.value(m.BUILD_INFO, "1.0") == 1
    assert merged.value(m.STORE_UP, "redis") == 0
    histogram = merged.histogram(m.TIME_TO_FIRST_TOKEN, "model")
    assert histogram is not None
    assert histogram.count == 7
    assert histogram.sum == pytest.approx(3 * 0.02 + 4 * 7.0)
    page = render(merged).decode()
    assert 'penstock_time_to_first_token_seconds_bucket{le="0.025",model="model"} 3.0' in page
    assert 'penstock_time_to_first_token_seconds_bucket{le="10.0",model="model"} 7.0' in page


def test_merging_leaves_the_parts_alone() -> None:
    part = over_the_wire(worker(3, 2, 0.02))
    before = msgspec.msgpack.encode(part)
    merge([part, part])
    assert msgspec.msgpack.encode(part) == before


def test_of_a_process_that_ended_only_what_it_counted_remains() -> None:
    gone = retired([over_the_wire(worker(3, 2, 0.02)), over_the_wire(worker(1, 9, 0.02))])
    merged = merge([gone, over_the_wire(worker(5, 1, 0.02))])
    assert merged.value(m.REQUESTS, "model", "completed") == 9
    assert merged.value(m.HTTP_IN_FLIGHT) == 1
    histogram = merged.histogram(m.TIME_TO_FIRST_TOKEN, "model")
    assert histogram is not None
    assert histogram.count == 9


def test_many_processes_do_not_grow_without_bound() -> None:
    kept = Snapshot()
    for number in range(3):
        recorder = Recorder()
        for series in range(MAX_SERIES):
            recorder.increment(m.GENERATION_TOKENS, f"model-{number}-{series}")
        kept = retired([kept, snapshot(recorder)])
    assert len(kept.series) <= MAX_SERIES + 1
    assert sum(series.value for series in kept.series) == 3 * MAX_SERIES


def test_an_unknown_metric_is_left_out() -> None:
    merged = merge([Snapshot([Series("penstock_of_tomorrow", (), 1.0)])])
    assert render(merged) == render(Recorder())
