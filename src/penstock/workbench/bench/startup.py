"""How long until a server is ready, against the floor that the tensor library sets: a bare `import torch`, measured in turns with it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from penstock.workbench.bench.compare import interleave, paired_difference
from penstock.workbench.bench.environment import describe_environment
from penstock.workbench.bench.load import BenchmarkError
from penstock.workbench.bench.report import StartupReport
from penstock.workbench.bench.server import ServerProcess


def measure_startup(
    command: Sequence[str],
    rounds: int,
    *,
    baseline: Sequence[str] = (sys.executable, "-c", "import torch"),
    on_run: Callable[[str, float], None] = lambda name, seconds: None,
) -> StartupReport:
    """Start and stop the server and the baseline `rounds` times each, after one unmeasured start of both that fills the file cache.

    Raises BenchmarkError when either fails.
    """
    environment = describe_environment()
    seconds: dict[str, list[float]] = {"server": [], "torch": []}
    measure: dict[str, Callable[[], float]] = {
        "server": lambda: _server_s(command),
        "torch": lambda: _process_s(baseline),
    }
    for run in measure.values():
        run()
    for _, name in interleave(list(measure), rounds):
        seconds[name].append(measure[name]())
        on_run(name, seconds[name][-1])
    difference = paired_difference(seconds["server"], seconds["torch"])
    settings: dict[str, Any] = {"command": list(command), "baseline": list(baseline), "rounds": rounds}
    return StartupReport(
        environment=environment,
        settings=settings,
        server_s=seconds["server"],
        torch_s=seconds["torch"],
        difference_median_s=difference.median,
        difference_low_s=difference.low,
        difference_high_s=difference.high,
    )


def _server_s(command: Sequence[str]) -> float:
    with ServerProcess(command) as server:
        return server.ready_s


def _process_s(command: Sequence[str]) -> float:
    started = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - a command of ours
    if finished.returncode:
        raise BenchmarkError(f"{' '.join(command)} exits with {finished.returncode}.")
    return time.perf_counter() - started
