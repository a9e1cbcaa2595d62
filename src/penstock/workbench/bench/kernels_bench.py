"""`penstock bench kernels` as data and as a table. What measures is given: this room knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from penstock.workbench.bench.environment import Environment
from penstock.workbench.bench.report import SCHEMA, align

# Of a ceiling; more than this is not noise.
BELIEVABLE_SHARE = 1.1


class KernelFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel on one shape. Seconds of one call; `ceiling_s`: what the machine's memory or arithmetic, whichever is slower, needs.

    bytes_read, operations: of one call. reference_s: torch's operator `reference` for the same, None where there is none.
    """

    kernel: str
    shape: str
    rows: int
    bytes_read: float
    operations: float
    seconds: float
    ceiling_s: float
    reference: str
    reference_s: float | None

    @property
    def share(self) -> float:
        """Of the ceiling, 0 to 1."""
        return self.ceiling_s / self.seconds


class KernelsReport(msgspec.Struct, frozen=True, kw_only=True):
    """`isa`: the instruction set whose kernels ran."""

    schema: int = SCHEMA
    kind: Literal["kernels"] = "kernels"
    environment: Environment
    isa: str
    threads: int
    figures: list[KernelFigure]


def kernels_table(figures: Sequence[KernelFigure]) -> str:
    """One row per kernel, shape and number of rows."""
    rows = [
        [
            "kernel",
            "shape",
            "rows",
            "µs",
            "GB/s",
            "GOPS",
            "% of ceiling",
            "torch µs",
            "torch / native",
            "torch's operator",
        ]
    ]
    for figure in figures:
        reference = figure.reference_s
        rows.append(
            [
                figure.kernel,
                figure.shape,
                str(figure.rows),
                f"{figure.seconds * 1e6:,.0f}",
                f"{figure.bytes_read / figure.seconds / 1e9:.1f}",
                f"{figure.operations / figure.seconds / 1e9:,.0f}",
                f"{figure.share:.0%}",
                "–" if reference is None else f"{reference * 1e6:,.0f}",
                "–" if reference is None else f"{reference / figure.seconds:.2f}",
                "–" if reference is None else figure.reference,
            ]
        )
    disturbed = [figure for figure in figures if figure.share > BELIEVABLE_SHARE]
    if not disturbed:
        return align(rows)
    return (
        f"{align(rows)}\n\n{len(disturbed)} kernels seem faster than the ceiling: other processes ran while it was measured, "
        "or caches held what was read. Do not trust the shares; run it again on an idle machine."
    )
