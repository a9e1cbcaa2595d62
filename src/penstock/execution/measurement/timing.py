"""Timing of short operations on a machine that other processes use too: two of them in turns, medians of several batches."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from penstock.execution.measurement.ceilings import Ceilings

Arithmetic = Literal["float32", "int8", "bfloat16"]
Run = Callable[[], object]
Item = TypeVar("Item")

BATCHES = 5
# Weights in use one after the other take at least this many bytes, more than the caches of current processors.
ROTATION_BYTES = 450_000_000


@dataclass(frozen=True)
class Case:
    """One kernel on one shape, and torch's operator for the same (None: there is none).

    rows: tokens (linear, attention) or requests (sampling). bytes_read, operations: of one call, at least.
    """

    kernel: str
    shape: str
    rows: int
    bytes_read: float
    operations: float
    arithmetic: Arithmetic
    run: Run
    reference: Run | None
    reference_name: str


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a case and of its reference, medians."""

    case: Case
    seconds: float
    reference_s: float | None


def without_memory(case: Case) -> Case:
    """The same figures without the tensors that its operations hold."""
    return dataclasses.replace(case, run=_nothing, reference=None)


def _nothing() -> None:
    raise RuntimeError("this case was measured and its tensors are gone")


def time_case(case: Case, budget_s: float) -> Timing:
    """Measure a case for about `budget_s` seconds, its reference for as long."""
    runs = [case.run] if case.reference is None else [case.run, case.reference]
    counts = [_calls_per_batch(run, budget_s / BATCHES) for run in runs]
    batches: list[list[float]] = [[] for _ in runs]
    for _ in range(BATCHES):
        for run, count, seconds in zip(runs, counts, batches, strict=True):
            started = time.perf_counter()
            for _ in range(count):
                run()
            seconds.append((time.perf_counter() - started) / count)
    medians = [statistics.median(seconds) for seconds in batches]
    return Timing(case, medians[0], medians[1] if len(medians) > 1 else None)


def ceiling_seconds(case: Case, ceilings: Ceilings) -> float:
    """The least time that this machine needs for a case; arithmetic that it has no instructions for is taken as float32."""
    peaks = {"float32": ceilings.float32, "int8": ceilings.int8, "bfloat16": ceilings.bfloat16}
    peak = peaks[case.arithmetic] or ceilings.float32
    return max(case.bytes_read / ceilings.read_bytes, case.operations / peak)


def copies_needed(nbytes: int) -> int:
    """Copies of something of `nbytes` that no cache holds together."""
    return max(1, -(-ROTATION_BYTES // nbytes))


def rotation(items: Sequence[Item]) -> Iterator[Item]:
    """One after the other, for ever."""
    return itertools.cycle(items)


def _calls_per_batch(run: Run, batch_s: float) -> int:
    run()
    started = time.perf_counter()
    run()
    return max(1, int(batch_s / max(time.perf_counter() - started, 1e-7)))
