"""`penstock bench ceilings` as data and as a table. What measures is given: this room knows no tensors."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.workbench.bench.environment import Environment
from penstock.workbench.bench.report import SCHEMA, align


class Peaks(msgspec.Struct, frozen=True, kw_only=True):
    """What `threads` threads reach together: 10^9 bytes per second from memory, 10^9 operations per second in registers.

    int8: u8 * s8 as VNNI or AMX multiply it, or in three AVX2 instructions. None: the processor has no instructions for it.
    """

    threads: int
    read_gb_s: float
    float32_gflops: float
    int8_gops: float | None
    bfloat16_gflops: float | None


class CeilingsReport(msgspec.Struct, frozen=True, kw_only=True):
    """`instructions`: arithmetic → the instruction set that was measured."""

    schema: int = SCHEMA
    kind: Literal["ceilings"] = "ceilings"
    environment: Environment
    instructions: dict[str, str]
    one_thread: Peaks
    all_threads: Peaks


def ceilings_table(report: CeilingsReport) -> str:
    """One row per ceiling, one column per number of threads."""
    columns = [report.one_thread]
    if report.all_threads.threads > 1:
        columns.append(report.all_threads)
    rows = [["", *(f"{peaks.threads} thread{'s' * (peaks.threads > 1)}" for peaks in columns)]]
    rows.append(["memory read, GB/s", *(f"{peaks.read_gb_s:.1f}" for peaks in columns)])
    figures: list[tuple[str, str, list[float | None]]] = [
        ("float32", "GFLOPS", [peaks.float32_gflops for peaks in columns]),
        ("int8", "GOPS", [peaks.int8_gops for peaks in columns]),
        ("bfloat16", "GFLOPS", [peaks.bfloat16_gflops for peaks in columns]),
    ]
    for name, unit, values in figures:
        instructions = report.instructions.get(name)
        title = f"{name} products, {unit} ({instructions})" if instructions else f"{name} products"
        rows.append([title, *("no instructions" if value is None else f"{value:,.0f}" for value in values)])
    return align(rows)
