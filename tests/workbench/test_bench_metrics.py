"""The arithmetic of latencies, percentiles, goodput and interleaved comparisons, against values worked out by hand."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from penstock.workbench.bench.compare import interleave, paired_difference, paired_ratio, spread
from penstock.workbench.bench.metrics import (
    Objectives,
    distribution,
    e2e,
    event_gaps,
    meets,
    summarize,
    token_gaps,
    tpot,
    ttft,
)
from penstock.workbench.bench.record import RequestRecord


def record(**changes: Any) -> RequestRecord:
    """Due at 10, sent at 10.5; tokens: one at 11, two at 12, one at 15."""
    settings: dict[str, Any] = {
        "index": 0,
        "due": 10.0,
        "sent": 10.5,
        "finished": 15.25,
        "asked_tokens": 4,
        "arrivals": ((11.0, 1), (12.0, 2), (15.0, 1)),
        "prompt_tokens": 100,
        "output_tokens": 4,
        "cached_tokens": 25,
        "counted_by": "usage",
        "exact": True,
    }
    return RequestRecord(**(settings | changes))


def test_latencies_count_from_the_due_time() -> None:
    assert ttft(record()) == 1.0
    assert e2e(record()) == 5.25


def test_merged_tokens_share_their_gap() -> None:
    assert event_gaps(record()) == [1.0, 3.0]
    assert token_gaps(record()) == [0.5, 0.5, 3.0]
    assert tpot(record()) == pytest.approx(4 / 3)
    assert sum(token_gaps(record())) == pytest.approx(15.0 - 11.0)


def test_tokens_beside_the_first_have_no_gap() -> None:
    merged = record(arrivals=((11.0, 3), (13.0, 1)))
    assert token_gaps(merged) == [2.0]
    assert tpot(merged) == 2.0


def test_one_event_has_no_time_per_token() -> None:
    single = record(arrivals=((11.0, 4),))
    assert tpot(single) is None
    assert token_gaps(single) == []
    assert meets(single, Objectives(tpot_s=0.001))


def test_percentiles_interpolate_between_order_statistics() -> None:
    values = distribution(float(value) for value in range(101))
    assert values is not None
    assert (values.count, values.mean, values.max) == (101, 50.0, 100.0)
    assert (values.p50, values.p90, values.p95, values.p99) == pytest.approx((50.0, 90.0, 95.0, 99.0))
    pair = distribution([1.0, 2.0])
    assert pair is not None
    assert pair.p90 == pytest.approx(1.9)
    assert distribution([]) is None


def test_summary_of_a_run() -> None:
    records = [
        record(),
        record(index=1, due=12.0, finished=20.0),
        record(index=2, error="http_503", output_tokens=0, arrivals=()),
    ]
    metrics = summarize(records)
    assert (metrics.requests, metrics.completed, metrics.failed, metrics.errors) == (3, 2, 1, {"http_503": 1})
    assert metrics.duration_s == 10.0
    assert (metrics.prompt_tokens, metrics.output_tokens) == (200, 8)
    assert (metrics.request_throughput, metrics.output_throughput, metrics.total_throughput) == (0.2, 0.8, 20.8)
    assert metrics.cached_share == 0.25
    assert metrics.itl is not None
    assert metrics.itl.count == 6
    assert metrics.event_gap is not None
    assert metrics.event_gap.count == 4
    assert metrics.lag is not None
    assert metrics.lag.max == 0.5
    assert metrics.goodput is None


def test_a_server_that_does_not_say_what_was_cached() -> None:
    assert summarize([record(cached_tokens=None)]).cached_share is None


def test_nothing_to_summarise() -> None:
    with pytest.raises(ValueError, match="nothing"):
        summarize([])


def test_goodput_counts_requests_within_every_objective() -> None:
    records = [record(), record(due=9.0), record(error="timeout", arrivals=())]
    metrics = summarize(records, Objectives(ttft_s=1.5, e2e_s=6.0))
    # The second was due a second earlier and so has a TTFT of 2 s; the third failed.
    assert metrics.goodput == pytest.approx(1 / 6.25)
    assert metrics.goodput_share == pytest.approx(1 / 3)
    assert summarize(records, Objectives(tpot_s=1.0)).goodput == 0.0


def test_all_failed_has_no_latencies() -> None:
    metrics = summarize([record(error="connect", arrivals=(), output_tokens=0)], Objectives(ttft_s=1.0))
    assert (metrics.ttft, metrics.itl, metrics.tpot, metrics.e2e) == (None, None, None, None)
    assert (metrics.completed, metrics.output_throughput, metrics.goodput) == (0, 0.0, 0.0)


def test_paired_ratio_and_verdict() -> None:
    ratio = paired_ratio([102.0, 101.0, 103.0, 101.0, 102.0], [100.0] * 5)
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (1.02, 1.01, 1.03, 5)
    assert ratio.below(1.05) == "yes"
    assert ratio.below(1.0) == "no"
    assert ratio.below(1.015) == "undecided"
    assert ratio.text() == "1.020 (1.010–1.030, n=5)"


def test_few_pairs_decide_nothing() -> None:
    assert paired_difference([1.0] * 4, [0.0] * 4).below(100.0) == "undecided"


def test_interval_drops_outliers_only_when_coverage_allows() -> None:
    assert spread([1.0] * 7 + [9.0]).high == 9.0
    nine = spread([0.0] + [1.0] * 7 + [9.0])
    assert (nine.low, nine.high) == (1.0, 1.0)
    assert spread([3.0]).median == 3.0


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    import random

    rng = random.Random(1)
    for count in (5, 9, 20):
        intervals = [spread([rng.random() for _ in range(count)]) for _ in range(2000)]
        assert statistics.mean(interval.low <= 0.5 <= interval.high for interval in intervals) > 0.92


def test_unequal_series_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        paired_ratio([1.0, 2.0], [1.0])


def test_interleaving_reverses_every_other_round() -> None:
    assert list(interleave("AB", 3)) == [(0, "A"), (0, "B"), (1, "B"), (1, "A"), (2, "A"), (2, "B")]
