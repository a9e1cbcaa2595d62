"""What does the gateway cost? A hit of the response cache over HTTP against the floor of an empty route, and the time it adds to a token.

    python benchmarks/gateway_overhead.py

Servers run on the first core, the load generator (benchmarks/http_load.py: prepared bytes, kept-alive connections) on the second. All
servers of a section stand beside each other and are measured in turns. The hit passes authentication, limits per key and the
cache; the engine stands idle. `fake` is the gateway in front of an engine that answers at once, so that all of the time is ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common import Options, Results, script_options
from http_load import Load, closed_loop, http_request
from penstock.workbench.bench.load import run_async
from penstock.workbench.bench.server import ServerProcess, free_port, penstock_command

HERE = Path(__file__).resolve().parent
SERVER_CORE, CLIENT_CORE = 0, 1
SECONDS = 2.0
CONNECTIONS = (1, 16)


class Target:
    """A server and the request that it is asked again and again."""

    def __init__(self, name: str, server: ServerProcess, request: bytes) -> None:
        self.name = name
        self.request = request
        self.port = int(server.url.rpartition(":")[2])


@script_options
def main(options: Options) -> None:
    """Milliseconds and requests per second of a cache hit, beside an empty route; milliseconds before the first token."""
    results = Results("gateway_overhead", options)
    data = results.section("hits", partial(_measure, options))
    rows = [["request", "clients", "p50 ms", "p99 ms", "requests/s", "of the empty FastAPI route"]]
    for connections in map(str, CONNECTIONS):
        for name, figures in data[connections].items():
            rows.append(
                [
                    name,
                    connections,
                    f"{figures['p50'] * 1000:.3f}",
                    f"{figures['p99'] * 1000:.3f}",
                    f"{figures['rate']:,.0f}",
                    f"{figures['share']:.2f} ({figures['low']:.2f}–{figures['high']:.2f})",
                ]
            )
    results.publish(
        rows,
        [
            "Medians of the rounds; the last column is the ratio of requests/s within a round, with its range.",
            f"Server on core {SERVER_CORE}, load generator on core {CLIENT_CORE}; closed loop.",
        ],
    )


def _measure(options: Options) -> dict[str, dict[str, dict[str, float]]]:
    rounds = options.repeat(7, 2)
    seconds = 0.5 if options.quick else SECONDS
    with contextlib.ExitStack() as stack:
        targets = _start(stack)
        os.sched_setaffinity(0, {CLIENT_CORE})
        for target in targets:
            _run(target, 1, 0.3)
        measured: dict[str, dict[str, list[Load]]] = {}
        for connections in CONNECTIONS:
            loads: dict[str, list[Load]] = {target.name: [] for target in targets}
            for _ in range(rounds):
                for target in targets:
                    loads[target.name].append(_run(target, connections, seconds))
            measured[str(connections)] = loads
    return {connections: _figures(loads) for connections, loads in measured.items()}


def _run(target: Target, connections: int, seconds: float) -> Load:
    load = run_async(closed_loop(target.port, target.request, connections, seconds))
    if set(load.statuses) != {200}:
        raise SystemExit(f"{target.name}: {load.statuses}")
    return load


def _figures(loads: dict[str, list[Load]]) -> dict[str, dict[str, float]]:
    floor = [load.rate for load in loads["empty FastAPI route"]]
    figures = {}
    for name, runs in loads.items():
        shares = [run.rate / rate for run, rate in zip(runs, floor, strict=True)]
        figures[name] = {
            "p50": statistics.median(run.quantile(0.5) for run in runs),
            "p99": statistics.median(run.quantile(0.99) for run in runs),
            "rate": statistics.median(run.rate for run in runs),
            "share": statistics.median(shares),
            "low": min(shares),
            "high": max(shares),
        }
    return figures


def _start(stack: contextlib.ExitStack) -> list[Target]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    key = _make_key(folder)
    get = partial(http_request, "GET")
    post = partial(http_request, "POST", "/v1/chat/completions", Content_Type="application/json")
    question = {"model": "stories", "messages": [{"role": "user", "content": "Tell me about a fox."}]}
    ask = json.dumps(question | {"max_tokens": 32, "temperature": 0}).encode()
    one = json.dumps(question | {"model": "fake-model", "max_tokens": 1, "temperature": 1.0}).encode()
    bearer = f"Bearer {key}"
    targets = []
    for kind, name in (("asgi", "empty ASGI application"), ("fastapi", "empty FastAPI route")):
        server = stack.enter_context(_pinned([sys.executable, str(HERE / "gateway_floor.py"), kind]))
        targets.append(Target(name, server, get("/health/ready")))
    server = stack.enter_context(_pinned([sys.executable, str(HERE / "gateway_floor.py"), "fake"]))
    targets.append(Target("one token of an engine that takes no time", server, post(one)))
    accounts = ["--auth", "keys", "--database-url", f"sqlite:///{folder}/accounts.db", "--kv-cache-gib", "0.05"]
    serve = penstock_command("serve", "stories", "--log-level", "warning", *accounts)
    server = stack.enter_context(_pinned(serve))
    targets.append(Target("cache hit (key, limits, memory)", server, post(ask, Authorization=bearer)))
    if shutil.which("redis-server") is None:
        print("redis-server is not installed: no figures with Redis")
        return targets
    server = stack.enter_context(_pinned([*serve, "--redis-url", stack.enter_context(_redis(folder))]))
    targets.append(Target("cache hit (key, limits, Redis)", server, post(ask, Authorization=bearer)))
    return targets


def _pinned(command: list[str]) -> ServerProcess:
    return ServerProcess(["taskset", "-c", str(SERVER_CORE), *command], timeout_s=120)


def _make_key(folder: Path) -> str:
    create = penstock_command("keys", "create", "--tenant", "bench", "--rpm", "100000000", "--tpm", "100000000000")
    create += ["--concurrency", "1000", "--json", "--database-url", f"sqlite:///{folder}/accounts.db"]
    key: str = json.loads(subprocess.run(create, capture_output=True, check=True).stdout)["key"]
    return key


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[str]:
    port = free_port()
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    command = ["taskset", "-c", str(CLIENT_CORE), "redis-server", *options]
    process: subprocess.Popen[Any] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
