"""Our fused attention beside torch's SDPA over prompts of 128 to 8,192 tokens: is it worth having?

The system that Penstock replaces claimed that a fused Triton kernel saves about 15 ms at 512 tokens over SDPA. SDPA is fused itself, so
the claim is measured here against SDPA's flash kernel, SDPA as torch chooses, and attention written out in three operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.gpu.case import Case, Context, Plan
from benchmarks.gpu.figures import is_right, measure_figures, share
from benchmarks.gpu.records import Record
from benchmarks.gpu.sections.kernels import Widths, arithmetic
from benchmarks.gpu.tables import NONE, TARGET_HEAD, median, target_cells
from benchmarks.gpu.targets import PREFILL_ATTENTION

from penstock.workbench.bench.compare import paired_difference, paired_ratio
from penstock.workbench.bench.report import markdown_table

TITLE = "Prefill attention beside SDPA"
MODELS = {"tinyllama-1.1b": 22, "llama-3.1-8b": 32}
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
FLASH, CHOSEN, WRITTEN = "SDPA flash", "SDPA", "written out"


def cases(plan: Plan) -> list[Case]:
    models = list(MODELS)[:1] if plan.tiny else list(MODELS)
    return [Case("prefill_attention", model, "prefill attention", 45.0, partial(_measure, model)) for model in models]


def _measure(model: str, context: Context) -> dict[str, Any]:
    from penstock.execution.measurement.gpu_attention import Heads, prefill_case

    plan, widths = context.plan, Widths.read(model, context.plan)
    heads = Heads(widths.heads, widths.kv_heads, widths.head_dim)
    lengths = (16, 32) if plan.tiny else TOKENS
    figures = measure_figures(
        (prefill_case(heads, tokens, arithmetic(plan), plan.torch_device()) for tokens in lengths), context
    )
    return figures | {"layers": MODELS[model]}


def line(data: dict[str, Any], record: Record) -> str:
    parts = []
    for figure in data["figures"]:
        other = figure["seconds"].get(FLASH) or figure["seconds"].get(CHOSEN)
        if other:
            parts.append(f"{figure['rows']}: {paired_ratio(other, figure['seconds']['']).median:.2f}")
    return f"speed over SDPA by tokens {', '.join(parts) or NONE}"


def report(records: Sequence[Record]) -> list[str]:
    lines = [
        "One causal prompt in bf16; keys and values are paged for ours, contiguous for SDPA. Speed over SDPA's flash kernel, 1 is as fast. "
        "`saved`: time of SDPA as torch chooses it minus ours, in all layers of the model together; negative: ours is slower.",
        "",
    ]
    for record in records:
        if record.data is None:
            continue
        head = ["tokens", "right", "ours µs", "SDPA flash µs", "SDPA µs", "written out µs", "% of ceiling"]
        rows = [[*head, "speed over flash", *TARGET_HEAD, "saved ms per prompt"]]
        rows += [_row(figure, record.data["layers"]) for figure in record.data["figures"]]
        lines += [
            f"**{record.case}**, {record.data['figures'][0]['shape'].partition(', ')[2]}",
            "",
            markdown_table(rows),
            "",
        ]
    return lines


def _row(figure: dict[str, Any], layers: int) -> list[str]:
    seconds = figure["seconds"]
    ours, flash = seconds[""], seconds.get(FLASH)
    speeds = None if flash is None else [other / own for other, own in zip(flash, ours, strict=True)]
    chosen = seconds.get(CHOSEN)
    saved = NONE
    if chosen is not None:
        saved = paired_difference([1e3 * layers * s for s in chosen], [1e3 * layers * s for s in ours]).text(2)
    return [
        f"{figure['rows']:,}",
        is_right(figure),
        *(_microseconds(seconds.get(name)) for name in ("", FLASH, CHOSEN, WRITTEN)),
        f"{share(figure):.0%}",
        NONE if flash is None else paired_ratio(flash, ours).text(2),
        *(target_cells(None, ours) if speeds is None else target_cells(PREFILL_ATTENTION, speeds)),
        saved,
    ]


def _microseconds(seconds: Sequence[float] | None) -> str:
    return NONE if seconds is None else f"{median(seconds) * 1e6:,.1f}"
