"""From records of requests to the figures that serving systems are compared by. All times in seconds.

    due     sent   first token        …        last token = finished
     |--lag--|--------|----|----|---------|----|
     |----- TTFT -----|ITL |ITL |   ITL   |ITL |
     |------------------ E2E -------------------|        TPOT = (last token − first token) / (tokens − 1)

ITL is per token. An event with k tokens that comes after a gap of g seconds counts as k gaps of g/k; what a reader of the stream
notices, the gap between events, is `event_gap`. Tokens that come in one event with the first have no gap and are left out of ITL.
Only successful requests have latencies; failed ones count in `failed`, in the duration, and against goodput.

Goodput is the rate of requests that meet every objective (Zhong et al., "DistServe", OSDI 2024).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from penstock.workbench.bench.record import RequestRecord


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """A sample's size, mean and percentiles (linear interpolation between order statistics)."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Objectives(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Service-level objectives of one request, in seconds; None: not demanded."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft_s, self.tpot_s, self.e2e_s))


class LoadMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `duration_s` goes from the first request's due time to the end of the last answer. Throughputs are per second of it.

    `cached_share`: prompt tokens that the server took from its prefix cache, by its own account (None: it does not say).
    `asked_length`: requests whose output had exactly the length asked for. `exact_arrivals`: requests whose tokens per
    event are known and add up to the server's count. `lag`: how late the generator itself sent. `goodput` is None without objectives.
    """

    requests: int
    completed: int
    failed: int
    errors: dict[str, int]
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float
    cached_share: float | None
    asked_length: int
    exact_arrivals: int
    ttft: Distribution | None
    itl: Distribution | None
    event_gap: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    lag: Distribution | None
    goodput: float | None
    goodput_share: float | None


def distribution(values: Iterable[float]) -> Distribution | None:
    """None for no values."""
    sample = np.fromiter(values, dtype=np.float64)
    if not sample.size:
        return None
    p50, p90, p95, p99 = (float(value) for value in np.percentile(sample, (50, 90, 95, 99)))
    return Distribution(
        count=sample.size, mean=float(sample.mean()), p50=p50, p90=p90, p95=p95, p99=p99, max=float(sample.max())
    )


def ttft(record: RequestRecord) -> float:
    """Time to first token, from when the request was due."""
    return record.arrivals[0][0] - record.due


def tpot(record: RequestRecord) -> float | None:
    """Mean time per output token after the first event; None when everything came in one event."""
    (first_at, first_count), (last_at, _) = record.arrivals[0], record.arrivals[-1]
    later = record.output_tokens - first_count
    return (last_at - first_at) / later if later > 0 and last_at > first_at else None


def e2e(record: RequestRecord) -> float:
    """From when the request was due to the end of its answer."""
    return record.finished - record.due


def event_gaps(record: RequestRecord) -> list[float]:
    """Seconds between one event with tokens and the next."""
    times = [at for at, _ in record.arrivals]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def token_gaps(record: RequestRecord) -> list[float]:
    """Inter-token latencies: each event's gap, spread evenly over its tokens."""
    counts = [count for _, count in record.arrivals[1:]]
    return [gap / count for gap, count in zip(event_gaps(record), counts, strict=True) for _ in range(count)]


def meets(record: RequestRecord, objectives: Objectives) -> bool:
    """True when a request succeeded within every objective. A request without a second event has no TPOT to miss."""
    if record.error is not None:
        return False
    measured = ((ttft(record), objectives.ttft_s), (tpot(record), objectives.tpot_s), (e2e(record), objectives.e2e_s))
    return all(limit is None or value is None or value <= limit for value, limit in measured)


def summarize(records: Sequence[RequestRecord], objectives: Objectives | None = None) -> LoadMetrics:
    """The metrics of one run. Raises ValueError without records."""
    if not records:
        raise ValueError("There is nothing to summarise.")
    good = [record for record in records if record.error is None]
    duration = max(record.finished for record in records) - min(record.due for record in records)
    prompt_tokens = sum(record.prompt_tokens or 0 for record in good)
    output_tokens = sum(record.output_tokens for record in good)
    known = [record for record in good if record.cached_tokens is not None and record.prompt_tokens]
    queried = sum(record.prompt_tokens or 0 for record in known)
    met = sum(meets(record, objectives) for record in records) if objectives else None
    return LoadMetrics(
        requests=len(records),
        completed=len(good),
        failed=len(records) - len(good),
        errors=dict(Counter(record.error for record in records if record.error is not None)),
        duration_s=duration,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        request_throughput=len(good) / duration,
        output_throughput=output_tokens / duration,
        total_throughput=(prompt_tokens + output_tokens) / duration,
        cached_share=sum(record.cached_tokens or 0 for record in known) / queried if queried else None,
        asked_length=sum(record.output_tokens == record.asked_tokens for record in good),
        exact_arrivals=sum(record.exact for record in good),
        ttft=distribution(map(ttft, good)),
        itl=distribution(gap for record in good for gap in token_gaps(record)),
        event_gap=distribution(gap for record in good for gap in event_gaps(record)),
        tpot=distribution(value for value in map(tpot, good) if value is not None),
        e2e=distribution(map(e2e, good)),
        lag=distribution(record.sent - record.due for record in records),
        goodput=None if met is None else met / duration,
        goodput_share=None if met is None else met / len(records),
    )
