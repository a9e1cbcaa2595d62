"""256 requests of 1,000 tokens in and 1,000 out, everything at once: the setting in which vendors publish Llama-3.1-8B in fp8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.case import Case, Context, Plan
from benchmarks.gpu.engines import LOAD_S, Setup, draw_prompts, kept_engine
from benchmarks.gpu.records import Record
from benchmarks.gpu.roofline import Card, workload_seconds
from benchmarks.gpu.sections.nano_vllm import line, measure_workload
from benchmarks.gpu.tables import TARGET_HEAD, bandwidth, median, median_and_range, peak, target_cells
from benchmarks.gpu.targets import OFFLINE
from benchmarks.gpu.workloads import Nano

from penstock.workbench.bench.report import markdown_table

__all__ = ["TITLE", "cases", "line", "report"]

TITLE = "Llama-3.1-8B in fp8, 1,000 in and 1,000 out"
SETUP = Setup("llama-3.1-8b", "fp8")
REQUESTS, TOKENS = 256, 1000
MEASURE_S = 110.0


def cases(plan: Plan) -> list[Case]:
    if plan.tiny:
        return []
    return [Case("offline", SETUP.name, SETUP.name, MEASURE_S, _measure, LOAD_S[SETUP.shape])]


def _measure(context: Context) -> dict[str, Any]:
    asked = Nano(draw_prompts(REQUESTS, TOKENS, "offline"), [TOKENS] * REQUESTS)
    return measure_workload(kept_engine(context, SETUP), asked, context, budget_s=110.0)


def report(records: Sequence[Record]) -> list[str]:
    rows = [["model", "output tok/s", "seconds", "% of bound", *TARGET_HEAD]]
    for record in records:
        if record.data is None:
            continue
        data = record.data
        setup = Setup(*data["setup"])
        plan = record.plan
        sizes = setup.sizes(plan)
        lengths = [TOKENS] * REQUESTS
        card = Card(bandwidth(record), (record.ceilings or {}).get("float8") or peak(record))
        bound = workload_seconds(sizes, setup.weights, lengths, lengths, card, kv_bytes=setup.kv_bytes(plan))
        seconds = median(data["seconds"])
        verdict = target_cells(OFFLINE.get(setup.shape), data["tokens_per_s"])
        rows.append(
            [setup.name, median_and_range(data["tokens_per_s"]), f"{seconds:.1f}", f"{bound / seconds:.0%}", *verdict]
        )
    text = f"{REQUESTS} requests, temperature 0.6. The published figure beside it is TensorRT-LLM's on one H200: 17,744 tokens/s."
    return [text, "", markdown_table(rows)]
