"""What the prefix cache costs when nothing hits: two engines in one process, one without it, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.case import Case, Context, Plan
from benchmarks.gpu.engines import Setup, load
from benchmarks.gpu.records import Record
from benchmarks.gpu.targets import PREFIX_COST

from penstock.workbench.bench.compare import interleave, paired_ratio
from penstock.workbench.bench.report import markdown_table
from penstock.workbench.bench.workload import Lengths, Workload

TITLE = "The prefix cache without hits"
SHAPE = "tinyllama-1.1b"
# Smaller than what the rounds ask for, so that blocks are evicted all the time.
KV_CACHE_GIB = 4.0
ROUNDS = 11


def cases(plan: Plan) -> list[Case]:
    return [Case("prefix_cache", SHAPE, "prefix cache", 70.0, _measure)]


def _measure(context: Context) -> dict[str, Any]:
    tiny = context.plan.tiny
    prompt, output, count = (32, 2, 2) if tiny else (768, 32, 128)
    workload = Workload(input_lengths=Lengths(prompt, prompt), output_lengths=Lengths(output, output), seed=1)
    more = {} if tiny else {"kv_cache_gib": KV_CACHE_GIB}
    engines = {}
    rounds = 2 if tiny else max(ROUNDS, context.plan.rounds)
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    cached = 0
    try:
        engines["on"] = load(Setup(SHAPE), context.plan, prefix_caching=True, **more)
        engines["off"] = load(Setup(SHAPE), context.plan, prefix_caching=False, **more)
        for engine in engines.values():
            for number in (rounds, rounds + 1):
                engine.run(workload.requests(count, first=number * count))
        for number, name in interleave(["on", "off"], rounds):
            run = engines[name].run(workload.requests(count, first=number * count))
            seconds[name].append(run.wall_s)
            cached += run.cached_tokens
    finally:
        for engine in engines.values():
            engine.shutdown()
    return {"batch": [prompt, output, count], "seconds": seconds, "cached_tokens": cached}


def line(data: dict[str, Any], record: Record) -> str:
    return f"on / off {paired_ratio(data['seconds']['on'], data['seconds']['off']).text()}"


def report(records: Sequence[Record]) -> list[str]:
    rows = [["model", "batch", "on / off", "must", "good", "stretch", "verdict"]]
    for record in records:
        if record.data is None:
            continue
        on, off = record.data["seconds"]["on"], record.data["seconds"]["off"]
        prompt, output, count = record.data["batch"]
        ratios = [above / below for above, below in zip(on, off, strict=True)]
        batch = f"{count} × {prompt} in, {output} out"
        rows.append([SHAPE, batch, paired_ratio(on, off).text(), *PREFIX_COST.cells(), PREFIX_COST.verdict(ratios)])
    text = "Prompts that neither engine has seen; time of a batch with the cache over the time without. Blocks are evicted all the time."
    return [text, "", markdown_table(rows)]
