"""One request: output tokens per second after the first, with 32 tokens of prompt and 256 of output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.cpu.rows import Row
from benchmarks.gpu.case import Case, Context, Plan, repeat
from benchmarks.gpu.engines import LOAD_S, Setup, kept_engine
from benchmarks.gpu.records import Record
from benchmarks.gpu.roofline import NOMINAL_LAUNCH, Card, decode_rate, step_bytes
from benchmarks.gpu.tables import NONE, TARGET_HEAD, bandwidth, median, median_and_range, peak, target_cells
from benchmarks.gpu.targets import SINGLE_STREAM

from penstock.workbench.bench.report import markdown_table

TITLE = "One request"
SHAPES = ("tinyllama-1.1b", "qwen2.5-1.5b", "llama-3.1-8b")
PRECISIONS = ("bf16", "int8", "int4", "fp8")
ROW = Row("decode", "", "decode", 1, 32, 257, ())
TINY_ROW = Row("decode", "", "decode", 1, 8, 33, ())
MEASURE_S = 10.0


def cases(plan: Plan) -> list[Case]:
    shapes, precisions = (SHAPES[:1], ("bf16", "int4")) if plan.tiny else (SHAPES, PRECISIONS)
    return [
        Case("single_stream", setup.name, setup.name, MEASURE_S, partial(_measure, setup), LOAD_S[shape])
        for precision in precisions
        for shape in shapes
        for setup in [Setup(shape, precision)]
    ]


def _measure(setup: Setup, context: Context) -> dict[str, Any]:
    engine = kept_engine(context, setup)
    row = TINY_ROW if context.plan.tiny else ROW
    row.measure(engine.generate, f"{setup.name}/warm-up")
    rates = repeat(lambda n: row.measure(engine.generate, f"{setup.name}/{n}"), context.plan.rounds, 30.0)
    sizes, length = setup.sizes(context.plan), row.prompt + row.output / 2
    return {
        "shape": setup.shape,
        "precision": setup.precision,
        "tokens_per_s": rates,
        "step_bytes": step_bytes(sizes, setup.weights, 1, length, setup.kv_bytes(context.plan)),
        "context": length,
        "engine": engine.described(),
    }


def line(data: dict[str, Any], record: Record) -> str:
    rate = median(data["tokens_per_s"])
    moved = rate * data["step_bytes"]
    return f"{rate:,.0f} tok/s, {moved / 1e9:,.0f} GB/s = {moved / bandwidth(record):.0%} of the ceiling"


def report(records: Sequence[Record]) -> list[str]:
    head = ["model, weights", "GB/step", "tok/s", "GB/s", "% of ceiling", "bytes bound tok/s", "with launches tok/s"]
    rows = [[*head, *TARGET_HEAD]]
    for record in records:
        if record.data is None:
            continue
        data = record.data
        setup = Setup(data["shape"], data["precision"])
        moved = median(data["tokens_per_s"]) * data["step_bytes"]
        rows.append(
            [
                f"{setup.name} ({data['engine']['weights']})",
                f"{data['step_bytes'] / 1e9:.3f}",
                median_and_range(data["tokens_per_s"]),
                f"{moved / 1e9:,.0f}",
                f"{moved / bandwidth(record):.0%}",
                f"{bandwidth(record) / data['step_bytes']:,.0f}",
                _launch_bound(setup, data["context"], record),
                *target_cells(SINGLE_STREAM.get((setup.shape, setup.precision)), data["tokens_per_s"]),
            ]
        )
    text = (
        f"Random weights, {ROW.prompt} tokens in, {ROW.output} out, greedy; {ROW.output - 1} / (time for {ROW.output} tokens − time "
        "for 1). The bound with launches adds a kernel's time in a CUDA graph of this call for each of 7 kernels a layer."
    )
    return [text, "", markdown_table(rows)]


def _launch_bound(setup: Setup, context: float, record: Record) -> str:
    if record.plan.tiny:
        return NONE
    launch = (record.ceilings or {}).get("graph_launch_s") or NOMINAL_LAUNCH
    card = Card(bandwidth(record), peak(record), launch)
    return f"{decode_rate(setup.sizes(record.plan), setup.weights, 1, context, card):,.0f}"
