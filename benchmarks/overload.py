"""Ten times what the server can do, for a minute: does it go on doing what it can?

    python benchmarks/overload.py

Capacity first: a closed loop with as many clients as the engine runs at once, by the same generator. Then an open loop (Poisson arrivals,
no retries) at ten times that rate. The generator costs CPU time on the same two cores in both, and its share is reported. In the end the
load stops, and five seconds later the service has to be idle and healthy.
"""

from __future__ import annotations

import time
import urllib.request
from functools import partial
from typing import Any

import psutil

from common import Model, Options, Results, find_model, script_options, served_name, start_server
from penstock.workbench.bench.arrival import ClosedLoop, OpenLoop
from penstock.workbench.bench.client import Target
from penstock.workbench.bench.load import LoadRun, run_async, run_load
from penstock.workbench.bench.metrics import distribution
from penstock.workbench.bench.workload import Lengths, Workload

FACTOR = 10
SECONDS = 60
CONCURRENCY = 64
PROMPT, OUTPUT = 32, 128
RECOVERY_S = 5
KV_CACHE_GIB = 0.125
EDGE_S = 2.0


@script_options
def main(options: Options) -> None:
    """Goodput and refusals at ten times the capacity, and the state of the service after it."""
    results = Results("overload", options)
    rows = [["model", "load", "requests/s", "completed/s", "of capacity", "refused p50 ms", "p99 ms", "other errors"]]
    rows[0] += ["memory MiB", "generator's share of a core"]
    for name in options.choose("stories"):
        data = results.section(name, partial(_measure, find_model(name, options), options))
        rows += [_row(name, load, data[load]) for load in ("capacity", "overload")]
    results.publish(
        rows,
        [
            f"Prompts of {PROMPT}, answers of {OUTPUT} tokens, Cache-Control: no-store; capacity: closed loop of {CONCURRENCY}.",
            f"Overload: open loop at {FACTOR} times the capacity. Memory: of all processes of the server, before and at the end.",
            f"Rates without the first and (closed loop) last {EDGE_S:g} s, in which the engine is not full.",
            f"{RECOVERY_S} s after the load: {data['after']}.",
        ],
    )


def _row(name: str, load: str, data: dict[str, Any]) -> list[str]:
    refused = data["refused"]
    return [
        name,
        load,
        f"{data['offered']:.0f}",
        f"{data['goodput']:.1f}",
        f"{data['share']:.2f}",
        "–" if refused is None else f"{refused['p50'] * 1000:.1f}",
        "–" if refused is None else f"{refused['p99'] * 1000:.1f}",
        str(data["other"]),
        f"{data['memory_before']:.0f} → {data['memory_after']:.0f}",
        f"{data['generator']:.2f}",
    ]


def _measure(model: Model, options: Options) -> dict[str, Any]:
    seconds = 5 if options.quick else SECONDS
    # A KV cache that the warm-up touches as a whole: pages that are used for the first time would look like a leak.
    with start_server(model, max_num_seqs=CONCURRENCY, kv_cache_gib=KV_CACHE_GIB) as server:
        target = Target(url=server.url, model=served_name(server.url))
        workload = Workload(
            input_lengths=Lengths(PROMPT, PROMPT), output_lengths=Lengths(OUTPUT, OUTPUT), seed=1, token_range=(3, 4000)
        )
        process = psutil.Process(server.pid)
        _load(target, workload, ClosedLoop(CONCURRENCY), 4 * CONCURRENCY, process)
        count = 20 * CONCURRENCY
        capacity = _load(target, workload, ClosedLoop(CONCURRENCY), count, process)
        rate = FACTOR * capacity["goodput"]
        overload = _load(target, workload, OpenLoop(rate, seed=1), int(rate * seconds), process)
        time.sleep(RECOVERY_S)
        after = _state(server.url)
    for data in (capacity, overload):
        data["share"] = data["goodput"] / capacity["goodput"]
    return {"capacity": capacity, "overload": overload, "after": after}


def _load(
    target: Target, workload: Workload, arrival: ClosedLoop | OpenLoop, count: int, process: psutil.Process
) -> dict[str, Any]:
    before, started = _memory(process), time.perf_counter()
    run: LoadRun = run_async(run_load(target, workload, arrival, count))
    wall = time.perf_counter() - started
    first = min(record.due for record in run.records)
    completed = [record for record in run.records if record.error is None]
    refused = [record.finished - record.sent for record in run.records if record.error == "http_503"]
    last_due = max(record.due for record in run.records)
    # Without the edges, where the engine is not full: the first requests, and what runs out at the end.
    begin = first + EDGE_S
    end = last_due if isinstance(arrival, OpenLoop) else max(record.finished for record in completed) - EDGE_S
    in_time = [record for record in completed if begin < record.finished <= end]
    spread = distribution(refused)
    return {
        "offered": count / max(last_due - first, 1e-9)
        if isinstance(arrival, OpenLoop)
        else len(in_time) / (end - begin),
        "goodput": len(in_time) / (end - begin),
        "refused": None if spread is None else {"p50": spread.p50, "p99": spread.p99, "count": spread.count},
        "other": count - len(completed) - len(refused),
        "errors": sorted({record.error for record in run.records if record.error not in (None, "http_503")}),
        "memory_before": before,
        "memory_after": _memory(process),
        "generator": run.client_cpu_s / wall,
    }


def _memory(process: psutil.Process) -> float:
    """Resident MiB of a process and its children."""
    return sum(child.memory_info().rss for child in (process, *process.children(recursive=True))) / 2**20


def _state(url: str) -> str:
    """Ready or not, and what runs still."""
    with urllib.request.urlopen(url + "/health/ready", timeout=5) as response:  # noqa: S310 - loopback
        ready = response.status == 200
    with urllib.request.urlopen(url + "/metrics", timeout=5) as response:  # noqa: S310 - loopback
        lines = response.read().decode().splitlines()
    names = ("penstock_requests_in_flight{", "penstock_engine_requests_running{", "penstock_engine_requests_waiting{")
    running = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))
    return f"{'ready' if ready else 'not ready'}, {running:.0f} requests running or waiting"


if __name__ == "__main__":
    main()
