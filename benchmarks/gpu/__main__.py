"""Measure Penstock on this machine's GPU.

    PYTHONPATH=src python3 -m benchmarks.gpu --sections all --output DIR --budget-s 570 --resume

Writes DIR/gpu.jsonl, a line for each case as soon as it is measured, and at the end DIR/gpu_NAME.md with all cases of this machine and
commit. What does not fit into the budget is left for the next call with --resume. --tiny --device cpu tries the script out without a GPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from benchmarks.common import RESULTS
from benchmarks.gpu import report
from benchmarks.gpu.case import Plan
from benchmarks.gpu.driver import FIRST, Driver, Left, RunError
from benchmarks.gpu.plot import draw_prefill_attention
from benchmarks.gpu.records import Record, Records, source_version, write_atomically
from benchmarks.gpu.sections import NAMES, all_cases, section
from benchmarks.gpu.worker import work

ROUNDS = 7
TINY_ROUNDS = 2


@click.command(help=__doc__)
@click.option("--sections", default="all", show_default=True, help=f"all, or some of {','.join(NAMES)}.")
@click.option("--only", "only", multiple=True, help="Cases whose SECTION/NAME contains this; repeatable.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=True)
@click.option("--budget-s", default=570.0, show_default=True, help="Seconds after which this call ends.")
@click.option("--resume", is_flag=True, help="Skip cases that were measured on this machine from this commit.")
@click.option(
    "--commit", default="", help="Name of the version measured (default: the commit, or a hash of the sources)."
)
@click.option("--rounds", type=click.IntRange(min=1), help=f"Interleaved repetitions (default: {ROUNDS}).")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="A trial of the script with a tiny model; the figures say nothing.")
@click.option("--list", "list_only", is_flag=True, help="List the cases and about how long each takes.")
def main(
    sections: str,
    only: tuple[str, ...],
    output: Path,
    budget_s: float,
    resume: bool,
    commit: str,
    rounds: int | None,
    device: str,
    tiny: bool,
    list_only: bool,
) -> None:
    """See the module."""
    names = list(NAMES) if sections == "all" else sections.split(",")
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise click.UsageError(f"There is no section {', '.join(unknown)}; known: {', '.join(NAMES)}.")
    if tiny != (device == "cpu"):
        raise click.UsageError(
            "--tiny and --device cpu belong together: a GPU's figures need real models, a CPU has none."
        )
    if tiny and output.resolve() == RESULTS:
        raise click.UsageError("A trial writes no results: give --output a folder of its own.")
    plan = Plan(device, tiny, rounds or (TINY_ROUNDS if tiny else ROUNDS))
    cases = [
        case
        for case in all_cases(plan, names)
        if case.section == "ceilings" or not only or any(part in case.key for part in only)
    ]
    if list_only:
        for case in cases:
            click.echo(f"{case.expected_s:6.0f} s  {case.key}  ({case.group})")
        return
    records = Records(output)
    version = commit or source_version()
    driver = Driver(plan, records, version, budget_s, work, say=_Progress(len(cases)).say)
    try:
        left = driver.run(cases, resume=resume)
    except RunError as error:
        raise click.ClickException(str(error)) from error
    _finish(driver, records, version, output, tiny=tiny)
    _say_left(left)


class _Progress:
    """Says what is done, a line for each case."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._started = total, 0, time.monotonic()

    def say(self, record: Record) -> None:
        self._done += 1
        if record.data is None:
            text = f"failed: {' '.join((record.error or '').split())[:200]}"
        else:
            text = section(record.section).line(record.data, record)
        passed = time.monotonic() - self._started
        click.echo(f"[{passed:4.0f} s, {self._done}/{self._total}] {record.key} in {record.seconds:.0f} s: {text}")
        sys.stdout.flush()


def _finish(driver: Driver, records: Records, version: str, output: Path, *, tiny: bool) -> None:
    """Write the page and the picture."""
    machine = driver.machine
    if machine is None:
        return
    order = {name: number for number, name in enumerate(NAMES)}
    chosen = [*records.all_of(FIRST, machine, version), *records.latest(machine, version, besides=FIRST).values()]
    latest = sorted(chosen, key=lambda record: order.get(record.section, len(order)))
    text = report.page(latest, machine, version, tiny=tiny)
    path = output / f"gpu_{machine.slug}.md"
    write_atomically(path, text)
    picture = draw_prefill_attention(latest, output / f"gpu_{machine.slug}_prefill_attention")
    click.echo(text)
    click.echo(f"Written: {records.path}, {path}{'' if picture is None else f', {picture}'}")


def _say_left(left: Left) -> None:
    if left.skipped:
        click.echo(f"{len(left.skipped)} cases were there already.")
    if left.out_of_time:
        click.echo(
            f"{len(left.out_of_time)} cases did not fit; call again with --resume: {', '.join(left.out_of_time)}"
        )


if __name__ == "__main__":
    main()
