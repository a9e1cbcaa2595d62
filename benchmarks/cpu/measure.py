"""Measures engines in turns: all of one precision are loaded at once, and every round asks each of them, in the opposite order of the
round before, so that a drift of the machine hits all.

An engine that after two rounds does not reach half of the best in a row is not asked again for that row: nothing is left to decide, and
the run stays short enough to be repeated.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cpu.checkpoints import Checkpoints
from benchmarks.cpu.engines import Conditions, Setup, start
from benchmarks.cpu.peers import Found
from benchmarks.cpu.rows import Row
from benchmarks.cpu.worker import Worker

from penstock.workbench.bench.compare import interleave
from penstock.workbench.bench.load import BenchmarkError

SLOW_AFTER_ROUNDS = 2
SLOW_SHARE = 0.5
IDLE_S = 1.0
STARTUP = "startup"
MEMORY = "memory"
Progress = Callable[[str], None]


@dataclass
class Result:
    """One engine in one precision. samples: row → values in the order of the rounds; row "startup": seconds, "memory": bytes."""

    setup: Setup
    name: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: str = ""
    problems: dict[str, str] = field(default_factory=dict)
    idle_cpu: float = 0.0

    def add(self, row: str, value: float) -> None:
        self.samples.setdefault(row, []).append(value)

    def as_dict(self) -> dict[str, Any]:
        return {
            "engine": self.setup.key,
            "name": self.name,
            "weights": self.setup.weights,
            "kv_cache": self.setup.kv,
            "versions": self.versions,
            "notes": self.notes,
            "samples": self.samples,
            "problems": self.problems,
            "idle_cpu": self.idle_cpu,
        }


@dataclass(frozen=True)
class Bench:
    """What the measurement of one shape in one precision needs. `logs`: folder for what engines print.

    progress is called before every measurement with what it is, sampled after it with row, engine and value.
    """

    checkpoints: Checkpoints
    conditions: Conditions
    found: dict[str, Found]
    rounds: int
    logs: Path
    progress: Progress
    sampled: Callable[[str, str, float], None]

    def worker(self, setup: Setup) -> Worker:
        log = self.logs / f"{setup.key}-{self.checkpoints.shape}-{setup.precision.replace(' ', '-')}.log"
        return start(setup, self.found[setup.key], self.conditions, log)

    def settings(self, setup: Setup) -> dict[str, Any]:
        return setup.settings(self.checkpoints, self.found[setup.key].interpreter(), self.conditions)


def measure(bench: Bench, setups: Sequence[Setup], rows: Sequence[Row], *, startup: bool) -> list[Result]:
    """All rows for all setups. A setup that fails says so in its `problems` and does not end the others."""
    results = [Result(setup, bench.found[setup.key].peer.name) for setup in setups]
    settings: dict[str, dict[str, Any]] = {}
    for result in results:
        try:
            settings[result.setup.key] = bench.settings(result.setup)
        except BenchmarkError as error:
            result.problems["load"] = str(error)
    if startup:
        _measure_startup(bench, results, settings)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for result in results:
            if result.setup.key in settings and "load" not in result.problems:
                worker = _load(bench, result, settings[result.setup.key], stack)
                if worker is not None:
                    workers[result.setup.key] = worker
        _measure_idle(results, workers)
        for row in rows:
            _measure_row(bench, row, results, workers)
    return results


def _measure_startup(bench: Bench, results: Sequence[Result], settings: dict[str, dict[str, Any]]) -> None:
    """Seconds from the start of a process to its first token, after one unmeasured start that fills the page cache and the engine's own."""
    able = [result for result in results if result.setup.key in settings]
    for number, result in interleave(able, bench.rounds + 1):
        if "load" in result.problems:
            continue
        bench.progress(f"{result.name} {result.setup.precision} start")
        try:
            with bench.worker(result.setup) as worker:
                worker.ask("load", settings=settings[result.setup.key])
                worker.ask("generate", prompts=[list(range(300, 316))], output_tokens=1)
                seconds = time.perf_counter() - worker.started
        except BenchmarkError as error:
            result.problems["load"] = str(error)
            continue
        if number:
            result.add(STARTUP, seconds)
            bench.sampled(STARTUP, result.name, seconds)


def _load(bench: Bench, result: Result, settings: dict[str, Any], stack: ExitStack) -> Worker | None:
    bench.progress(f"{result.name} {result.setup.precision} load")
    worker = stack.enter_context(bench.worker(result.setup))
    try:
        answer = worker.ask("load", settings=settings)
        for tokens in (1, 8):
            _generate(worker, [[400 + tokens] * 16], tokens)
    except BenchmarkError as error:
        result.problems["load"] = str(error)
        worker.stop()
        return None
    result.versions, result.notes = answer["versions"], answer["notes"]
    return worker


def _measure_idle(results: Sequence[Result], workers: dict[str, Worker]) -> None:
    """CPU seconds per second that each loaded engine takes while nobody asks: a spinning one would slow down all others."""
    time.sleep(IDLE_S)
    before = {key: worker.cpu_seconds() for key, worker in workers.items()}
    time.sleep(IDLE_S)
    for result in results:
        if result.setup.key in workers:
            spent = workers[result.setup.key].cpu_seconds() - before[result.setup.key]
            result.idle_cpu = round(spent / IDLE_S, 3)


def _measure_row(bench: Bench, row: Row, results: Sequence[Result], workers: dict[str, Worker]) -> None:
    able = [result for result in results if result.setup.key in workers]
    most = row.requests == max(32, row.requests)
    if most:
        for worker in workers.values():
            worker.reset_peak()
    for number, result in interleave(able, bench.rounds):
        if row.key in result.problems or (number >= SLOW_AFTER_ROUNDS and _is_slow(result, row.key, able)):
            bench.progress("")
            continue
        bench.progress(f"{result.name} {result.setup.precision} {row.key}")
        worker = workers[result.setup.key]
        try:
            value = row.measure(partial(_generate, worker), f"{row.key}/{number}")
        except BenchmarkError as error:
            result.problems[row.key] = str(error)
            continue
        result.add(row.key, value)
        bench.sampled(row.key, result.name, value)
    if most:
        for result in able:
            if row.key in result.samples:
                result.add(MEMORY, float(workers[result.setup.key].peak_bytes()))


def _is_slow(result: Result, row: str, others: Sequence[Result]) -> bool:
    if result.setup.key == "penstock":
        return False
    best = max(statistics.median(other.samples[row]) for other in others if row in other.samples)
    return statistics.median(result.samples[row]) < SLOW_SHARE * best


def _generate(worker: Worker, prompts: list[list[int]], tokens: int) -> float:
    """Seconds. Raises BenchmarkError when an output is not of the length asked for, because the figure would be of something else."""
    answer = worker.ask("generate", prompts=prompts, output_tokens=tokens)
    if answer["tokens"] != [tokens] * len(prompts):
        raise BenchmarkError(f"gave {sorted(set(answer['tokens']))} tokens instead of {tokens}")
    seconds: float = answer["seconds"]
    return seconds
