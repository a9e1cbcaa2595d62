"""The batched rows again through Penstock's own server with streaming, in turns with the engine alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import flags, served_name
from benchmarks.cpu.engines import Setup
from benchmarks.cpu.measure import Bench
from benchmarks.cpu.rows import Row
from benchmarks.cpu.worker import Worker

from penstock.workbench.bench.arrival import ClosedLoop
from penstock.workbench.bench.client import Target
from penstock.workbench.bench.compare import interleave, paired_ratio
from penstock.workbench.bench.load import BenchmarkError, run_async, run_load
from penstock.workbench.bench.metrics import summarize
from penstock.workbench.bench.server import ServerProcess, penstock_command
from penstock.workbench.bench.workload import Lengths, Workload


@dataclass
class Rounds:
    """Output tokens per second of both, and CPU seconds of the client per second of its run."""

    engine: list[float]
    http: list[float]
    client_share: list[float]


def measure_http(bench: Bench, setup: Setup, rows: Sequence[Row]) -> dict[str, Any]:
    """Row title → figures; `setup` is Penstock's. Raises BenchmarkError when the server does not start or a request fails."""
    settings = bench.settings(setup)
    command = penstock_command(
        "serve",
        settings["model"],
        *flags({k: v for k, v in settings.items() if k != "model"} | {"log_level": "warning"}),
    )
    figures = {}
    with ServerProcess(command) as server, bench.worker(setup) as worker:
        worker.ask("load", settings=settings)
        target = Target(url=server.url, model=served_name(server.url))
        for row in rows:
            rounds = _measure_row(bench, row, target, worker)
            ratio = paired_ratio(rounds.http, rounds.engine)
            figures[row.title] = {
                "engine": rounds.engine,
                "http": rounds.http,
                "median": statistics.median(rounds.http),
                "ratio": ratio.text(),
                "client_cpu_share": statistics.median(rounds.client_share),
            }
    return figures


def _measure_row(bench: Bench, row: Row, target: Target, worker: Worker) -> Rounds:
    rounds = Rounds([], [], [])
    workload = Workload(
        input_lengths=Lengths(row.prompt, row.prompt), output_lengths=Lengths(row.output, row.output), seed=row.requests
    )
    for number, which in interleave(["engine", "http"], bench.rounds):
        requests = workload.requests(row.requests, first=number * row.requests)
        if which == "engine":
            answer = worker.ask("generate", prompts=[request.prompt for request in requests], output_tokens=row.output)
            rounds.engine.append(row.requests * row.output / answer["seconds"])
            continue
        run = run_async(run_load(target, workload, ClosedLoop(row.requests), row.requests, first=number * row.requests))
        metrics = summarize(run.records)
        if metrics.failed or metrics.asked_length != row.requests:
            raise BenchmarkError(f"{metrics.failed} requests failed {metrics.errors}; the round is not a figure.")
        rounds.http.append(metrics.output_throughput)
        rounds.client_share.append(run.client_cpu_s / metrics.duration_s)
    return rounds
