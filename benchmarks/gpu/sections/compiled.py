"""torch.compile as an alternative: norm, gated activation and a whole MLP, compiled by torch and written by us."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.case import Case, Context, Plan
from benchmarks.gpu.figures import measure_figures, summary, table_rows
from benchmarks.gpu.records import Record
from benchmarks.gpu.sections.kernels import Widths, arithmetic

from penstock.workbench.bench.report import markdown_table

if TYPE_CHECKING:
    from penstock.execution.measurement.gpu_timing import GPUCase

TITLE = "torch.compile"
MODEL = "tinyllama-1.1b"
ROWS = (1, 64, 256)


def cases(plan: Plan) -> list[Case]:
    return [Case("compiled", MODEL, "compiled", 80.0, _measure)]


def _measure(context: Context) -> dict[str, Any]:
    from penstock.execution.measurement.gpu_compiled import fragment_cases

    plan, widths = context.plan, Widths.read(MODEL, context.plan)

    def every() -> Iterator[GPUCase]:
        for rows in (1,) if plan.tiny else ROWS:
            sizes = (widths.hidden, widths.inner)
            # Compiling takes a C++ compiler on a CPU; the trial runs the same functions as they are.
            yield from fragment_cases(sizes, rows, arithmetic(plan), plan.torch_device(), compiled=not plan.tiny)

    return measure_figures(every(), context)


def line(data: dict[str, Any], record: Record) -> str:
    return summary(data, record)


def report(records: Sequence[Record]) -> list[str]:
    text = (
        "The engine runs the first of each pair; where torch.compile is faster beyond the rounds' interval, it would be worth its start-up "
        "time. MLP: two products by cuBLAS in both, with our kernel or with what torch generates between them."
    )
    return [text, "", markdown_table(table_rows(records))]
