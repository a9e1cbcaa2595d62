"""What do tensor and pipeline parallelism cost and bring, and does a count of bytes and operations say so beforehand?

    python benchmarks/parallel_scaling.py

On a machine with two cores two ranks have one core each, so they can be as fast as one rank with two threads at best: what is measured is
the price of dividing a model. Three engines in turns, in every round: one rank with two threads, two tensor ranks and two pipeline stages
with one thread each. What they should take, from t(requests), the step of one rank on both cores:

    2 tensor ranks     t + 2 · layers · sum([T, hidden]) + gather([requests, vocabulary / 2])
    2 stages           one request: 2 t, because one core works at a time; eight: two steps of four at once, 2 t(4), on one core each

The sums and gathers are measured by themselves in two processes in the same run. Ratios are taken within a round; medians.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import time
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from common import SHAPES, Options, Results, find_model, script_options
from penstock.core.config import EngineConfig
from penstock.core.types import EngineRequest, SamplingParams
from penstock.engine.engine import Engine

SHAPE = "tinyllama-1.1b"
ENGINES: dict[str, dict[str, Any]] = {
    "1 rank, 2 threads": {"threads": 2},
    "2 tensor ranks": {"threads": 1, "tensor_parallel_size": 2},
    "2 stages": {"threads": 1, "pipeline_parallel_size": 2},
}
BASE = "1 rank, 2 threads"
# requests, prompt tokens, output tokens
WORKLOADS = {"1 request, decode": (1, 16, 33), "8 requests, decode": (8, 16, 33), "1 request, prefill": (1, 512, 1)}
REPEATS = 200


def main_measure(options: Options, precision: str) -> dict[str, Any]:
    """Seconds per step of each engine and workload, and the model's prediction."""
    rounds = options.repeat(5, 1)
    model = find_model(SHAPE if not options.quick else "stories", options)
    engines = {name: _engine(model.settings | more, precision) for name, more in ENGINES.items()}
    seconds: dict[str, dict[str, list[float]]] = {work: {name: [] for name in ENGINES} for work in WORKLOADS}
    try:
        ids = itertools.count()
        for number in range(rounds + 1):
            names = list(ENGINES)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                for work, shape in WORKLOADS.items():
                    value = _seconds_per_step(engines[name], ids, *shape)
                    if number:  # the first round warms up
                        seconds[work][name].append(value)
            print(f"  round {number} of {rounds}", flush=True)
    finally:
        for engine in engines.values():
            engine.shutdown()
    shape = json.loads((SHAPES / SHAPE / "config.json").read_text())
    return {"seconds": seconds, "collectives": _collectives(shape), "shape": shape}


def _engine(settings: dict[str, Any], precision: str) -> Engine:
    from penstock.hub import resolve_models
    from penstock.launch import build_engine

    more = {"prefix_caching": False, "max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 1024}
    folder, config = resolve_models(
        EngineConfig(**(settings | more | {"quantization": precision, "kv_cache_gib": 0.25}))
    )
    return build_engine(config, folder)[0]


def _seconds_per_step(engine: Engine, ids: itertools.count[int], requests: int, prompt: int, output: int) -> float:
    """A prefill: seconds of it. Decoding: seconds between the first tokens of all requests and their last, per token of a request."""
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=0)
    for index in range(requests):
        tokens = [3 + (7 * index + 31 * place) % 4000 for place in range(prompt)]
        engine.add(EngineRequest(request_id=f"r{next(ids)}", prompt_token_ids=tokens, sampling=sampling))
    started = time.perf_counter()
    first: float | None = None
    news: dict[str, int] = {}
    while engine.has_work():
        for _, delta in engine.step():
            news[delta.request_id] = news.get(delta.request_id, 0) + len(delta.token_ids)
        if first is None and len(news) == requests:
            first, begun_with = time.perf_counter(), min(news.values())
    ended = time.perf_counter()
    if output == 1 or first is None:
        return ended - started
    return (ended - first) / (output - begun_with)


# ---- collectives by themselves ----


def _collectives(shape: dict[str, Any]) -> dict[str, float]:
    """Seconds of the sums and gathers of a step between two processes with one thread each."""
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    port = _free_port()
    name = f"scaling-{os.getpid()}"
    peer = context.Process(target=_collective_rank, args=(1, port, name, shape, child))
    first = context.Process(target=_collective_rank, args=(0, port, name, shape, child))
    peer.start()
    first.start()
    result: dict[str, float] = parent.recv()
    peer.join()
    first.join()
    return result


def _free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _collective_rank(rank: int, port: int, name: str, shape: dict[str, Any], answer: Connection) -> None:
    import torch
    import torch.distributed as dist

    from penstock.execution.parallel.process_group import TorchCollectives, make_collectives

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("no process group")
    shared = make_collectives(rank, 2, device=torch.device("cpu"), group=group, shared=name)
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]
    result: dict[str, float] = {}
    for kind, collectives in (("shared memory", shared), ("gloo", TorchCollectives(group, 2))):
        for tokens in (1, 8, 512):
            data = torch.zeros(tokens, hidden)
            result[f"{kind}, sum [{tokens}, {hidden}]"] = _median(partial(collectives.all_reduce, data), tokens)
        for tokens in (1, 8):
            part = torch.zeros(tokens, vocab // 2)
            result[f"{kind}, gather [{tokens}, {vocab // 2}]"] = _median(partial(collectives.all_gather, part), tokens)
    if rank == 0:
        answer.send(result)
    dist.barrier()
    dist.destroy_process_group()


def _median(operation: Any, tokens: int) -> float:
    times = []
    for _ in range(REPEATS if tokens < 100 else 10):
        begun = time.perf_counter()
        operation()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[len(times) // 10 :])


# ---- what was expected, what came ----


def predicted(data: dict[str, Any], work: str, name: str) -> float | None:
    """Seconds per step by the model at the top."""
    requests, prompt, output = WORKLOADS[work]
    tokens = prompt if output == 1 else requests
    one = statistics.median(data["seconds"][work][BASE])
    shape, cost = data["shape"], data["collectives"]
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]
    if name == "2 tensor ranks":
        sums = 2 * shape["num_hidden_layers"] * cost[f"shared memory, sum [{tokens}, {hidden}]"]
        return one + sums + cost[f"shared memory, gather [{requests}, {vocab // 2}]"]
    if name == "2 stages":
        return 2 * (one if requests == 1 else _of_half_the_requests(data, work))
    return None


def _of_half_the_requests(data: dict[str, Any], work: str) -> float:
    """Seconds of a step of four requests, between those of one and of eight."""
    one = statistics.median(data["seconds"]["1 request, decode"][BASE])
    eight = statistics.median(data["seconds"][work][BASE])
    return one + (eight - one) * 3 / 7


def rows_of(precision: str, data: dict[str, Any]) -> list[list[str]]:
    rows = []
    for work in WORKLOADS:
        base = data["seconds"][work][BASE]
        for name in ENGINES:
            values = data["seconds"][work][name]
            speed = statistics.median(b / v for b, v in zip(base, values, strict=True))
            model = predicted(data, work, name)
            rows.append(
                [
                    precision,
                    work,
                    name,
                    f"{1000 * statistics.median(values):.1f}",
                    f"{speed:.2f}",
                    "–" if model is None else f"{1000 * model:.1f}",
                    "–" if model is None else f"{statistics.median(values) / model:.2f}",
                ]
            )
    return rows


@script_options
def main(options: Options) -> None:
    """Steps of one rank, two tensor ranks and two stages, beside a model of what they should take."""
    results = Results("parallel_scaling", options)
    rows = [["weights", "workload", "engine", "ms per step", "speed / 1 rank", "model ms", "measured / model"]]
    notes = []
    for precision in ("int8",) if options.quick else ("int8", "auto"):
        data = results.section(precision, partial(main_measure, options, precision))
        rows += rows_of("bfloat16" if precision == "auto" else precision, data)
        costs = ", ".join(f"{name} {1e6 * value:,.0f} µs" for name, value in data["collectives"].items())
        notes.append(f"Collectives of two ranks with one thread each ({precision}): {costs}.")
    results.publish(rows, notes)


if __name__ == "__main__":
    main()
