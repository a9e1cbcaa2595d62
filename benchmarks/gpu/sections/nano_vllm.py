"""The workload of nano-vllm's bench.py: 256 sequences, 100 to 1,024 tokens in and out, everything at once, prefill included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.gpu.case import Case, Context, Plan, repeat
from benchmarks.gpu.engines import LOAD_S, Engine, Setup, idle_share, kept_engine
from benchmarks.gpu.records import Record
from benchmarks.gpu.roofline import Card, workload_seconds
from benchmarks.gpu.tables import NONE, TARGET_HEAD, bandwidth, median, median_and_range, peak, target_cells
from benchmarks.gpu.targets import NANO
from benchmarks.gpu.workloads import Nano, nano

from penstock.workbench.bench.report import markdown_table

TITLE = "The workload of nano-vllm"
SHAPES = ("tinyllama-1.1b", "qwen3-0.6b", "qwen2.5-1.5b", "llama-3.1-8b")
TEMPERATURE = 0.6
MEASURE_S = {"tinyllama-1.1b": 25.0, "qwen3-0.6b": 45.0, "qwen2.5-1.5b": 30.0, "llama-3.1-8b": 100.0}


def cases(plan: Plan) -> list[Case]:
    return [
        Case("nano_vllm", shape, Setup(shape).name, MEASURE_S[shape], partial(_measure, Setup(shape)), LOAD_S[shape])
        for shape in (SHAPES[:1] if plan.tiny else SHAPES)
    ]


def workload(plan: Plan) -> Nano:
    """bench.py's, or a few short sequences."""
    return nano(3, low=2, high=8) if plan.tiny else nano()


def _measure(setup: Setup, context: Context) -> dict[str, Any]:
    return measure_workload(kept_engine(context, setup), workload(context.plan), context, budget_s=110.0)


def measure_workload(engine: Engine, asked: Nano, context: Context, *, budget_s: float) -> dict[str, Any]:
    """Rounds of one workload, each with ids of its own."""
    engine.run(asked.requests(1000)[:8], temperature=TEMPERATURE)
    before = engine.llm.stats
    runs = repeat(lambda n: engine.run(asked.requests(n), temperature=TEMPERATURE), context.plan.rounds, budget_s)
    after = engine.llm.stats
    return {
        "setup": [engine.setup.shape, engine.setup.precision, engine.setup.kv],
        "prompt_tokens": asked.prompt_tokens,
        "output_tokens": asked.output_tokens,
        "seconds": [run.wall_s for run in runs],
        "tokens_per_s": [run.output_throughput for run in runs],
        "cpu_s": [run.cpu_s for run in runs],
        "cached_tokens": sum(run.cached_tokens for run in runs),
        "steps": after.steps - before.steps,
        "idle_share": idle_share(before, after),
        "preemptions": after.preemptions - before.preemptions,
        "engine": engine.described(),
    }


def line(data: dict[str, Any], record: Record) -> str:
    return f"{median(data['tokens_per_s']):,.0f} tok/s in {median(data['seconds']):.2f} s"


def report(records: Sequence[Record]) -> list[str]:
    head = ["model", "tok/s", "seconds", "bound s", "% of bound", "steps", "preempted", "GPU waits"]
    rows = [[*head, *TARGET_HEAD]]
    for record in records:
        if record.data is None:
            continue
        data = record.data
        setup = Setup(*data["setup"])
        plan = record.plan
        asked = workload(plan)
        lengths = [len(prompt) for prompt in asked.prompts]
        card = Card(bandwidth(record), peak(record))
        bound = workload_seconds(
            setup.sizes(plan), setup.weights, lengths, asked.outputs, card, kv_bytes=setup.kv_bytes(plan)
        )
        rows.append(
            [
                setup.name,
                median_and_range(data["tokens_per_s"]),
                f"{median(data['seconds']):.2f}",
                f"{bound:.2f}",
                f"{bound / median(data['seconds']):.0%}",
                f"{data['steps'] / len(data['seconds']):,.0f}",
                str(data["preemptions"]),
                NONE if data["idle_share"] is None else f"{data['idle_share']:.1%}",
                *target_cells(NANO.get(setup.shape), data["tokens_per_s"]),
            ]
        )
    text = (
        "142,827 tokens in, 133,966 out, temperature 0.6; lengths and ids drawn as bench.py draws them after random.seed(0); from "
        "the second round on ids are shifted, so that no prefix is cached. Bound: every step's keys and values, weights once per step "
        "of the longest output, and the products of the prompts, at this call's ceilings."
    )
    return [text, "", markdown_table(rows)]
