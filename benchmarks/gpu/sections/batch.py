"""Batches of 64 and 256 requests with 1,024 tokens of context each: output tokens per second while all decode.

The prompts are in the prefix cache when the clock starts, so that all requests begin to decode together: a batch that is still prefilling
while its first requests decode would measure neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.gpu.case import Case, Context, Plan, repeat
from benchmarks.gpu.engines import LOAD_S, Engine, Setup, draw_prompts, kept_engine
from benchmarks.gpu.records import Record
from benchmarks.gpu.roofline import Card, decode_rate, step_bytes
from benchmarks.gpu.tables import TARGET_HEAD, bandwidth, median, median_and_range, peak, target_cells
from benchmarks.gpu.targets import BATCH

from penstock.workbench.bench.load import BenchmarkError
from penstock.workbench.bench.report import markdown_table
from penstock.workbench.bench.workload import BenchRequest

TITLE = "Batches at 1,024 tokens of context"
SETUPS = (
    Setup("tinyllama-1.1b"),
    Setup("qwen2.5-1.5b"),
    Setup("llama-3.1-8b"),
    Setup("tinyllama-1.1b", "int4"),
    Setup("llama-3.1-8b", "int4"),
    Setup("llama-3.1-8b", "fp8"),
    Setup("tinyllama-1.1b", "bf16", "fp8"),
    Setup("llama-3.1-8b", "bf16", "fp8"),
)
REQUESTS = (64, 256)
PROMPT, OUTPUT = 960, 129
TINY = (2, 32, 33)
MEASURE_S = 15.0


def cases(plan: Plan) -> list[Case]:
    setups, counts = (SETUPS[:1], TINY[:1]) if plan.tiny else (SETUPS, REQUESTS)
    return [
        Case(
            "batch",
            f"{setup.name} x{count}",
            setup.name,
            MEASURE_S,
            partial(_measure, setup, count),
            LOAD_S[setup.shape],
        )
        for setup in setups
        for count in counts
    ]


def _measure(setup: Setup, count: int, context: Context) -> dict[str, Any]:
    engine = kept_engine(context, setup)
    prompt, output = TINY[1:] if context.plan.tiny else (PROMPT, OUTPUT)
    rates, cached = decode_rates(engine, count, prompt, output, context.plan.rounds)
    sizes, length = setup.sizes(context.plan), prompt + output / 2
    return {
        "setup": [setup.shape, setup.precision, setup.kv],
        "requests": count,
        "tokens_per_s": rates,
        "cached_share": cached,
        "step_bytes": step_bytes(sizes, setup.weights, count, length, setup.kv_bytes(context.plan)),
        "context": length,
        "engine": engine.described(),
    }


def decode_rates(engine: Engine, count: int, prompt: int, output: int, rounds: int) -> tuple[list[float], float]:
    """Output tokens per second of a batch that decodes, once a round, and the share of its prompts that came from the prefix cache."""
    prompts = draw_prompts(count, prompt, f"{engine.setup.name}/{count}")

    def seconds(tokens: int) -> float:
        return engine.generate(prompts, tokens)

    seconds(1)
    cached = engine.run([BenchRequest(i, ids, len(ids), 1) for i, ids in enumerate(prompts)]).cached_tokens
    rates = repeat(lambda _: _rate(count, output, seconds(1), seconds(output)), rounds, 60.0)
    return rates, cached / (count * prompt)


def _rate(count: int, output: int, first_s: float, all_s: float) -> float:
    if all_s <= first_s:
        raise BenchmarkError("a whole batch took no longer than its first tokens: too short to be measured")
    return count * (output - 1) / (all_s - first_s)


def line(data: dict[str, Any], record: Record) -> str:
    rate = median(data["tokens_per_s"])
    moved = rate / data["requests"] * data["step_bytes"]
    return f"{rate:,.0f} tok/s, {moved / 1e9:,.0f} GB/s = {moved / bandwidth(record):.0%} of the ceiling"


def report(records: Sequence[Record]) -> list[str]:
    head = ["model, weights", "requests", "GB/step", "tok/s", "GB/s", "% of ceiling", "bound tok/s"]
    rows = [[*head, *TARGET_HEAD]]
    notes = []
    for record in records:
        if record.data is None:
            continue
        data = record.data
        setup = Setup(*data["setup"])
        count = data["requests"]
        moved = median(data["tokens_per_s"]) / count * data["step_bytes"]
        target = BATCH.get((setup.shape, count)) if (setup.precision, setup.kv) == ("bf16", "auto") else None
        rows.append(
            [
                setup.name,
                str(count),
                f"{data['step_bytes'] / 1e9:.2f}",
                median_and_range(data["tokens_per_s"]),
                f"{moved / 1e9:,.0f}",
                f"{moved / bandwidth(record):.0%}",
                f"{_bound(setup, data, record):,.0f}",
                *target_cells(target, data["tokens_per_s"]),
            ]
        )
        if data["cached_share"] < 0.9:
            notes.append(
                f"- {record.case}: only {data['cached_share']:.0%} of the prompts were cached; prefill is in the figure."
            )
    text = (
        f"{PROMPT} tokens in (cached), {OUTPUT} out, greedy; requests × {OUTPUT - 1} / (time for {OUTPUT} tokens − time for 1). "
        "Bound: the slower of bytes and products at this call's ceilings."
    )
    return [text, "", markdown_table(rows), *(["", *notes] if notes else [])]


def _bound(setup: Setup, data: dict[str, Any], record: Record) -> float:
    plan = record.plan
    card = Card(bandwidth(record), peak(record))
    sizes = setup.sizes(plan)
    return decode_rate(sizes, setup.weights, data["requests"], data["context"], card, kv_bytes=setup.kv_bytes(plan))
