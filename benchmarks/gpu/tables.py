"""Cells that several sections share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.gpu.records import Record
from benchmarks.gpu.targets import Target

from penstock.workbench.bench.compare import spread

NONE = "–"
TARGET_HEAD = ["must", "good", "stretch", "verdict"]


def bandwidth(record: Record) -> float:
    """Bytes per second of the card, as measured in the record's call."""
    figures = record.ceilings or {}
    return float(max(figures.get("copy_bytes", 0.0), figures.get("read_bytes", 0.0)))


def peak(record: Record) -> float:
    """Operations per second in bfloat16, as measured in the record's call."""
    return float((record.ceilings or {}).get("bfloat16", 0.0))


def median_and_range(values: Sequence[float], digits: int = 0) -> str:
    """The median and the interval around it."""
    found = spread(values)
    if len(values) == 1:
        return f"{found.median:,.{digits}f} (n=1)"
    return f"{found.median:,.{digits}f} ({found.low:,.{digits}f}–{found.high:,.{digits}f}, n={found.pairs})"


def target_cells(target: Target | None, values: Sequence[float]) -> list[str]:
    """Three levels and the verdict."""
    return [NONE] * 4 if target is None else [*target.cells(), target.verdict(values)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
