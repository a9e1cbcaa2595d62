"""`penstock bench`: the workbench's commands, and the two that measure this machine's kernels, which need the tensor wing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from penstock.core.errors import ConfigError
from penstock.workbench.bench.cli import bench

__all__ = ["bench"]

# The choices of execution/measurement, which is imported only when a command runs.
MODELS = ("tinyllama-1.1b", "qwen2.5-0.5b")
GROUPS = ("linear", "attention", "sampling")
KINDS = ("int8", "int4 g128", "int4 g32", "bfloat16", "float32")
TOKENS = (1, 8, 32, 128, 512)

json_option = click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the report here."
)
threads_option = click.option("--threads", default=0, show_default=True, help="CPU threads; 0: all cores.")


@bench.command()
@threads_option
@json_option
def ceilings(threads: int, json_path: Path | None) -> None:
    """Measure what this machine can do at most: memory bandwidth, and products of float32, int8 and bfloat16.

    Takes a few seconds. Figures of kernels and models are only as good as their share of these.
    """
    from penstock.execution.measurement.ceilings import Ceilings, measure_ceilings
    from penstock.workbench.bench.ceilings import CeilingsReport, Peaks, ceilings_table
    from penstock.workbench.bench.environment import describe_environment

    def peaks(measured: Ceilings) -> Peaks:
        return Peaks(
            threads=measured.threads,
            read_gb_s=measured.read_bytes / 1e9,
            float32_gflops=measured.float32 / 1e9,
            int8_gops=None if measured.int8 is None else measured.int8 / 1e9,
            bfloat16_gflops=None if measured.bfloat16 is None else measured.bfloat16 / 1e9,
        )

    environment = describe_environment()
    one = measure_ceilings(1)
    count = _threads(threads)
    every = one if count == 1 else measure_ceilings(count)
    report = CeilingsReport(
        environment=environment, instructions=one.instructions, one_thread=peaks(one), all_threads=peaks(every)
    )
    _write(report, json_path)
    click.echo(
        f"{environment.cpu}, {environment.cores} cores, load {environment.load_average}\n\n{ceilings_table(report)}"
    )


@bench.command()
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Shapes of this model; repeatable.")
@click.option("--group", "groups", multiple=True, type=click.Choice(GROUPS), help="Kernels of this group; repeatable.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Linear layers with weights of this kind."
)
@click.option("--tokens", "tokens", multiple=True, type=click.IntRange(1), help="Rows of linear layers; repeatable.")
@click.option("--seconds", default=0.2, show_default=True, help="Time for each kernel and shape.")
@threads_option
@json_option
def kernels(
    models: tuple[str, ...],
    groups: tuple[str, ...],
    kinds: tuple[str, ...],
    tokens: tuple[int, ...],
    seconds: float,
    threads: int,
    json_path: Path | None,
) -> None:
    """Measure the native CPU kernels: time, bandwidth, arithmetic and their share of what this machine can do.

    torch's operator for the same shape runs in turns with each. Weights rotate over more memory than caches hold. All cases take some
    minutes; choose with the options.
    """
    from tqdm import tqdm

    from penstock.execution.kernels.native import isa
    from penstock.execution.measurement.cases import measure_kernels
    from penstock.execution.measurement.timing import Timing, ceiling_seconds
    from penstock.workbench.bench.environment import describe_environment
    from penstock.workbench.bench.kernels_bench import KernelFigure, KernelsReport, kernels_table

    if not seconds > 0:
        raise ConfigError(f"--seconds must be above 0, not {seconds}.")
    environment, count = describe_environment(), _threads(threads)
    with tqdm(unit="kernel", dynamic_ncols=True) as bar:

        def show(timing: Timing) -> None:
            bar.set_postfix_str(f"{timing.case.kernel} {timing.case.shape}", refresh=False)
            bar.update()

        limits, timings = measure_kernels(count, models, groups or GROUPS, kinds, tokens or TOKENS, seconds, show)
    figures = [
        KernelFigure(
            kernel=timing.case.kernel,
            shape=timing.case.shape,
            rows=timing.case.rows,
            bytes_read=timing.case.bytes_read,
            operations=timing.case.operations,
            seconds=timing.seconds,
            ceiling_s=ceiling_seconds(timing.case, limits),
            reference=timing.case.reference_name,
            reference_s=timing.reference_s,
        )
        for timing in timings
    ]
    _write(KernelsReport(environment=environment, isa=isa(), threads=count, figures=figures), json_path)
    click.echo(
        f"{environment.cpu}, {count} threads, {isa()}, load {environment.load_average}\n\n{kernels_table(figures)}"
    )


def _write(report: Any, path: Path | None) -> None:
    import msgspec

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def _threads(asked: int) -> int:
    if asked < 0:
        raise ConfigError(f"--threads must be at least 0, not {asked}.")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or usable
