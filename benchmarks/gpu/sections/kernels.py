"""Every Triton kernel by itself: right beside its twin, in bfloat16 too, and how near to the ceiling, beside torch's operators."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.common import SHAPES
from benchmarks.gpu.case import Case, Context, Plan
from benchmarks.gpu.engines import TINY_CONFIG
from benchmarks.gpu.figures import measure_figures, summary, table_rows
from benchmarks.gpu.records import Record
from benchmarks.gpu.targets import DECODE_ATTENTION

from penstock.workbench.bench.report import markdown_table

if TYPE_CHECKING:
    import torch

    from penstock.execution.measurement.gpu_timing import GPUCase

TITLE = "Kernels"
MODELS = ("tinyllama-1.1b", "qwen2.5-1.5b", "llama-3.1-8b")
ROWS = (1, 16, 64, 256, 2048)
LINEAR_ROWS = (1, 2, 8, 16, 64, 256, 1024, 4096)
LINEAR_KINDS = ("bf16", "int8", "int4 g128", "int4 g32 zeros", "nf4 g64", "fp8", "fp8 blocks")
TINY_LINEAR_KINDS = ("int8", "int4 g32 zeros")
KV_TYPES = ("auto", "fp8", "int8")
DECODES = ((1, 1024), (1, 8192), (1, 32768), (8, 1024), (32, 1024), (64, 1024), (256, 1024), (16, 8192))
SAMPLING_ROWS = (1, 16, 64, 256)
VOCABULARIES = (32000, 151936)


@dataclass(frozen=True)
class Widths:
    """Of a model's layers."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def read(cls, model: str, plan: Plan) -> Widths:
        config = TINY_CONFIG if plan.tiny else json.loads((SHAPES / model / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(config["hidden_size"], config["intermediate_size"], heads, config["num_key_value_heads"], head_dim)

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Layer → (output features, input features), fused as the engine fuses them."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (query + 2 * kv, self.hidden),
            "o": (self.hidden, query),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


def cases(plan: Plan) -> list[Case]:
    models = MODELS[:1] if plan.tiny else MODELS
    found = [Case("kernels", f"rows {model}", "kernels", 12.0, partial(_rows, model)) for model in models]
    found += [Case("kernels", f"rotary {model}", "kernels", 8.0, partial(_rotary, model)) for model in models]
    for kv_type in KV_TYPES[:1] if plan.tiny else KV_TYPES:
        found += [
            Case("kernels", f"decode {model} {kv_type}-KV", "kernels", 15.0, partial(_decode, model, kv_type))
            for model in models
        ]
    found += [
        Case("kernels", f"linear {kind} {model}", f"kernels linear {model}", 20.0, partial(_linear, model, kind))
        for model in (models if plan.tiny else (MODELS[0], MODELS[2]))
        for kind in (TINY_LINEAR_KINDS if plan.tiny else LINEAR_KINDS)
    ]
    found += [Case("kernels", f"sampling {size}", "kernels", 20.0, partial(_sampling, size)) for size in VOCABULARIES]
    return found[:-1] if plan.tiny else found


def arithmetic(plan: Plan) -> torch.dtype:
    """The interpreter's products know no bfloat16."""
    import torch

    return torch.float32 if plan.tiny else torch.bfloat16


def _rows(model: str, context: Context) -> dict[str, Any]:
    from penstock.execution.measurement.gpu_rows import row_cases

    plan, widths = context.plan, Widths.read(model, context.plan)

    def every() -> Iterator[GPUCase]:
        for rows in ROWS[:1] if plan.tiny else ROWS:
            yield from row_cases(widths.hidden, widths.inner, rows, arithmetic(plan), plan.torch_device())

    return measure_figures(every(), context)


def _rotary(model: str, context: Context) -> dict[str, Any]:
    from penstock.execution.measurement.gpu_rotary import rotary_case

    plan, widths = context.plan, Widths.read(model, context.plan)
    heads = (widths.heads, widths.kv_heads, widths.head_dim)
    cases = (
        rotary_case(heads, rows, kv_type, arithmetic(plan), plan.torch_device())
        for kv_type in (KV_TYPES[:1] if plan.tiny else KV_TYPES)
        for rows in (ROWS[:1] if plan.tiny else ROWS)
    )
    return measure_figures(cases, context)


def _decode(model: str, kv_type: str, context: Context) -> dict[str, Any]:
    from penstock.execution.measurement.gpu_attention import Heads, decode_case

    plan, widths = context.plan, Widths.read(model, context.plan)
    heads = Heads(widths.heads, widths.kv_heads, widths.head_dim)
    cases = (
        decode_case(heads, requests, length, kv_type, arithmetic(plan), plan.torch_device())
        for requests, length in (((2, 48),) if plan.tiny else DECODES)
    )
    return measure_figures(cases, context)


def _linear(model: str, kind: str, context: Context) -> dict[str, Any]:
    from penstock.execution.measurement.gpu_linear import linear_cases

    plan, layers = context.plan, Widths.read(model, context.plan).linear

    def every() -> Iterator[GPUCase]:
        for name in ("o",) if plan.tiny else layers:
            rows = (1, 2) if plan.tiny else LINEAR_ROWS
            yield from linear_cases(name, layers[name], kind, rows, arithmetic(plan), plan.torch_device())

    return measure_figures(every(), context)


def _sampling(vocabulary: int, context: Context) -> dict[str, Any]:
    from penstock.execution.measurement.gpu_sampling import sampling_cases

    plan = context.plan

    def every() -> Iterator[GPUCase]:
        for rows in (2,) if plan.tiny else SAMPLING_ROWS:
            yield from sampling_cases(vocabulary if not plan.tiny else 4096, rows, plan.torch_device())

    return measure_figures(every(), context)


def line(data: dict[str, Any], record: Record) -> str:
    return summary(data, record)


def report(records: Sequence[Record]) -> list[str]:
    lines = [
        "`right`: the relative distance of the result from the twin's in plain torch is within what rounding explains. Times are of "
        "one call in a CUDA graph, inputs rotating over more than the L2 cache holds; bytes are those that must be read and written "
        "once. `eager`: could not be recorded, so that launches by the host are in the time.",
        "",
    ]
    for prefix, title in (("rows", "Rows"), ("rotary", "Rotary, norm and cache write"), ("decode", "Decode attention")):
        lines += _table(records, prefix, title)
    lines += _table(records, "linear", "Linear layers") + _table(records, "sampling", "Sampling")
    return lines


def _table(records: Sequence[Record], prefix: str, title: str) -> list[str]:
    chosen = [record for record in records if record.case.startswith(prefix) and record.data is not None]
    if not chosen:
        return []
    target = DECODE_ATTENTION if prefix == "decode" else None
    return [f"### {title}", "", markdown_table(table_rows(chosen, target)), ""]
