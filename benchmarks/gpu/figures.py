"""Kernels as figures: measured, compared with their twins, stored as plain data, and turned into rows of tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.case import Context
from benchmarks.gpu.records import Record
from benchmarks.gpu.tables import NONE, median
from benchmarks.gpu.targets import Target

from penstock.workbench.bench.compare import paired_ratio

if TYPE_CHECKING:
    import torch

    from penstock.execution.measurement.gpu_timing import GPUCase, IndexedRun

KERNEL_ROUNDS = 15
TINY_ROUNDS = 1
# A kernel that comes closer to the ceiling than this was served by a cache, or the ceiling was disturbed.
BELIEVABLE_SHARE = 1.1


def measure_figures(cases: Iterable[GPUCase], context: Context) -> dict[str, Any]:
    """Each case compared with its twin and timed beside its references. A reference that cannot run is left out and named."""
    import torch

    from penstock.execution.measurement.gpu_timing import time_case

    rounds = TINY_ROUNDS if context.plan.tiny else KERNEL_ROUNDS
    device = context.plan.torch_device()
    figures = []
    with torch.inference_mode():
        for case in cases:
            able, absent = _able(case.references, device)
            error = None if case.error is None else case.error()
            timing = time_case(replace(case, references=able), device, rounds=rounds)
            figures.append(
                {
                    "kernel": case.kernel,
                    "shape": case.shape,
                    "rows": case.rows,
                    "bytes_moved": case.bytes_moved,
                    "operations": case.operations,
                    "arithmetic": case.arithmetic,
                    "ceiling_s": context.card().seconds(case.bytes_moved, case.operations, case.arithmetic),
                    "seconds": timing.seconds,
                    "eager": list(timing.eager),
                    "absent": absent,
                    "error": error,
                    "tolerance": case.tolerance,
                }
            )
    return {"figures": figures}


def _able(runs: Any, device: torch.device) -> tuple[dict[str, IndexedRun], dict[str, str]]:
    """(those that run, why the others do not)."""
    import torch

    able: dict[str, IndexedRun] = {}
    absent: dict[str, str] = {}
    for name, run in runs.items():
        try:
            run(0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            absent[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            able[name] = run
    return able, absent


def is_right(figure: dict[str, Any]) -> str:
    """Whether a kernel's result was that of its twin."""
    if figure["error"] is None:
        return "not compared"
    return "yes" if figure["error"] <= figure["tolerance"] else f"NO: {figure['error']:.1e} > {figure['tolerance']:.1e}"


def share(figure: dict[str, Any]) -> float:
    """Of the ceiling, 0 to 1."""
    return float(figure["ceiling_s"] / median(figure["seconds"][""]))


def speed_up(figure: dict[str, Any], name: str) -> str:
    """A reference's time over ours, round by round."""
    other = figure["seconds"].get(name)
    return NONE if other is None else paired_ratio(other, figure["seconds"][""]).text(2)


def fastest(figure: dict[str, Any]) -> str:
    """The fastest of all that were measured for the same work; a tie within the rounds' interval is undecided."""
    medians = {name or "Penstock": median(seconds) for name, seconds in figure["seconds"].items()}
    best = min(medians, key=medians.__getitem__)
    ours = figure["seconds"][""]
    for name, seconds in figure["seconds"].items():
        contested = name and (best in (name, "Penstock"))
        if contested and paired_ratio(seconds, ours).below(1.0) == "undecided":
            return f"undecided (Penstock or {name})"
    return best


def summary(data: dict[str, Any], record: Record) -> str:
    """One line for a case: shares of the ceiling and wrong results."""
    figures = data["figures"]
    wrong = [figure for figure in figures if is_right(figure).startswith("NO")]
    shares = ", ".join(f"{figure['rows']}: {share(figure):.0%}" for figure in figures)
    return f"{'WRONG RESULTS, ' if wrong else ''}% of the ceiling by rows {shares}"


def table_rows(records: Sequence[Record], target: Target | None = None) -> list[list[str]]:
    """A head and a row for each figure; `target`: for the share of the ceiling."""
    head = ["kernel", "shape", "rows", "right", "µs", "GB/s", "TFLOP/s", "% of ceiling"]
    head += [] if target is None else ["must", "good", "stretch", "verdict"]
    rows = [[*head, "others: time over ours", "fastest"]]
    for record in records:
        for figure in (record.data or {}).get("figures", []):
            seconds = median(figure["seconds"][""])
            shares = [figure["ceiling_s"] / value for value in figure["seconds"][""]]
            doubt = "?" if share(figure) > BELIEVABLE_SHARE else ""
            others = [f"{name} {speed_up(figure, name)}" for name in figure["seconds"] if name]
            others += [f"{name}: cannot run" for name in figure["absent"]]
            rows.append(
                [
                    figure["kernel"] + (" (eager)" if "" in figure["eager"] else ""),
                    figure["shape"],
                    str(figure["rows"]),
                    is_right(figure),
                    f"{seconds * 1e6:,.1f}",
                    f"{figure['bytes_moved'] / seconds / 1e9:,.0f}",
                    f"{figure['operations'] / seconds / 1e12:,.1f}" if figure["operations"] else NONE,
                    f"{share(figure):.0%}{doubt}",
                    *([] if target is None else [*target.cells(), target.verdict(shares)]),
                    "; ".join(others) or NONE,
                    fastest(figure) if len(figure["seconds"]) > 1 else NONE,
                ]
            )
    return rows
