"""What do HTTP, the gateway and the second process cost? The same load on the engine alone and through the API, in turns.

    python benchmarks/engine_vs_http.py

The engine alone is `penstock.LLM` in this process with as many running requests as the closed loop has users. Both are loaded
while either is measured; the idle one waits. Client, gateway and engine share the machine's cores: the CPU seconds of each are
given.
"""

from __future__ import annotations

import random
import statistics
from functools import partial
from typing import Any

import psutil

from common import Model, Options, Results, find_model, milliseconds, script_options, served_name, start_server
from penstock.llm import LLM
from penstock.workbench.bench.arrival import ClosedLoop
from penstock.workbench.bench.client import Target
from penstock.workbench.bench.compare import interleave, paired_ratio
from penstock.workbench.bench.load import BenchmarkError, run_async, run_load
from penstock.workbench.bench.metrics import summarize
from penstock.workbench.bench.offline import run_batch
from penstock.workbench.bench.record import RequestRecord
from penstock.workbench.bench.workload import Lengths, Workload

# (concurrency, requests, prompt tokens, output tokens); big shapes run seconds per token.
CASES = {"stories": [(1, 8, 64, 128), (8, 48, 64, 128), (32, 96, 64, 128)]}
BIG_CASES = [(1, 1, 64, 24), (8, 8, 64, 24)]
QUICK_CASES = [(4, 8, 32, 32)]


@script_options
def main(options: Options) -> None:
    """Output tokens per second of the engine alone and through HTTP."""
    results = Results("engine_vs_http", options)
    head = ["model", "users", "engine tok/s", "HTTP tok/s", "HTTP/engine (median, interval)", "slower"]
    rows = [[*head, "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms", "CPU s client/gateway/engine"]]
    for name in options.choose("stories", "tinyllama-1.1b", "qwen2.5-0.5b"):
        for case in QUICK_CASES if options.quick else CASES.get(name, BIG_CASES):
            data = results.section(f"{name} c={case[0]}", partial(_measure, find_model(name, options), case, options))
            rows.append(_row(name, case[0], data))
    results.publish(
        rows, ["Unique prompts (no prefix hits), greedy, outputs of fixed length; medians over the rounds."]
    )


def _row(name: str, users: int, data: dict[str, Any]) -> list[str]:
    ratio = paired_ratio(data["http_tok_s"], data["engine_tok_s"])
    medians = [f"{statistics.median(data[key]):.1f}" for key in ("engine_tok_s", "http_tok_s")]
    cpu = "/".join(f"{statistics.median(data[key]):.2f}" for key in ("client_cpu_s", "gateway_cpu_s", "engine_cpu_s"))
    latency = [data["ttft_p50_ms"], data["itl_p50_ms"], data["itl_p99_ms"]]
    return [name, str(users), *medians, ratio.text(), ratio.below(1.0), *latency, cpu]


def _measure(model: Model, case: tuple[int, int, int, int], options: Options) -> dict[str, Any]:
    users, count, prompt, output = case
    workload = Workload(
        input_lengths=Lengths(prompt, prompt), output_lengths=Lengths(output, output), seed=random.getrandbits(32)
    )
    rounds = options.repeat(5, quick=2)
    series: dict[str, list[float]] = {
        key: [] for key in ("engine_tok_s", "http_tok_s", "client_cpu_s", "gateway_cpu_s", "engine_cpu_s")
    }
    records: list[RequestRecord] = []
    with start_server(model, max_num_seqs=users) as server, LLM(**model.settings, max_num_seqs=users) as llm:
        target = Target(url=server.url, model=served_name(server.url))
        warm = rounds * count
        run_batch(llm, workload.requests(users, first=warm))
        run_async(run_load(target, workload, ClosedLoop(users), users, first=warm))
        for number, which in interleave(["engine", "http"], rounds):
            if which == "engine":
                batch = run_batch(llm, workload.requests(count, first=number * count))
                series["engine_tok_s"].append(batch.output_throughput)
            else:
                before = _cpu_seconds(server.pid)
                run = run_async(run_load(target, workload, ClosedLoop(users), count, first=number * count))
                gateway, engine = (now - then for now, then in zip(_cpu_seconds(server.pid), before, strict=True))
                metrics = summarize(run.records)
                if metrics.failed or metrics.asked_length != count:
                    raise BenchmarkError(
                        f"{metrics.failed} requests failed {metrics.errors}; the round is not a figure."
                    )
                records += run.records
                for key, value in (
                    ("http_tok_s", metrics.output_throughput),
                    ("client_cpu_s", run.client_cpu_s),
                    ("gateway_cpu_s", gateway),
                    ("engine_cpu_s", engine),
                ):
                    series[key].append(value)
            print(f"  {number:2} {which:6} {series[which + '_tok_s'][-1]:9.1f} tok/s", flush=True)
    whole = summarize(records)
    latency = {
        "ttft_p50_ms": milliseconds(whole.ttft, "p50"),
        "itl_p50_ms": milliseconds(whole.itl, "p50"),
        "itl_p99_ms": milliseconds(whole.itl, "p99"),
    }
    return {"case": case, **series, **latency}


def _cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU seconds so far of the server's own process and of its children, the engine's among them."""
    server = psutil.Process(pid)
    own, *children = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return own.user + own.system, sum(times.user + times.system for times in children)


if __name__ == "__main__":
    main()
