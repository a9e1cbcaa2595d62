"""All records of one machine and commit as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.gpu.case import Machine
from benchmarks.gpu.records import Record
from benchmarks.gpu.sections import NAMES, section

SMOKE = "**A trial of the script on a CPU, not a result: every figure below says nothing about anything.**"


def page(records: Iterable[Record], machine: Machine, commit: str, *, tiny: bool) -> str:
    """The whole page. A section without records is left out; failed cases are listed."""
    found = list(records)
    lines = ["# Measurements on one GPU", ""]
    if tiny:
        lines += [SMOKE, ""]
    lines += [*machine_lines(machine, commit, found), ""]
    lines += [
        "Medians of interleaved rounds with an order-statistic interval; a verdict needs five rounds and an interval on one side of "
        "the level, else it is undecided. Targets were set for one H200. Shares are of the ceilings of the same call. How to run it "
        "and what each section means: [docs/gpu-benchmarks.md](../../docs/gpu-benchmarks.md).",
        "",
    ]
    for name in NAMES:
        of_section = [record for record in found if record.section == name]
        if any(record.data is not None for record in of_section):
            module = section(name)
            lines += [f"## {module.TITLE}", "", *module.report(of_section), ""]
    failures = [record for record in found if record.data is None]
    if failures:
        lines += ["## Failed", "", *(f"- {record.key}: {_one_line(record.error or '')}" for record in failures), ""]
    return "\n".join(lines)


def machine_lines(machine: Machine, commit: str, records: Sequence[Record]) -> list[str]:
    """What was measured, on what and when."""
    machines = {(found.driver, found.cpu, found.cores) for found in (machine, *(record.machine for record in records))}
    dates = sorted({record.date[:10] for record in records})
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return [
        f"- GPU: {machine.gpu}, {machine.memory_gib} GiB, {machine.multiprocessors} multiprocessors, CUDA {machine.cuda or 'none'}",
        *(f"- Host: {cpu}, {cores} cores, driver {driver or 'none'}" for driver, cpu, cores in sorted(machines)),
        f"- Versions: Python {machine.python}; {versions}",
        f"- Commit: {commit}; {' to '.join(sorted({dates[0], dates[-1]})) if dates else 'nothing measured'}",
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
