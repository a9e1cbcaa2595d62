"""What CUDA graphs and overlapped scheduling bring: four engines in one process, measured in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.cpu.rows import Row
from benchmarks.gpu.case import Case, Context, Plan
from benchmarks.gpu.engines import Engine, Setup, idle_share, load
from benchmarks.gpu.records import Record
from benchmarks.gpu.sections.batch import decode_rates
from benchmarks.gpu.tables import NONE, TARGET_HEAD, median, median_and_range, target_cells
from benchmarks.gpu.targets import CPU_SHARE

from penstock.workbench.bench.compare import interleave, paired_ratio
from penstock.workbench.bench.report import markdown_table

TITLE = "CUDA graphs and overlapped scheduling"
SWITCHES: dict[str, dict[str, Any]] = {
    "graphs, overlap": {"enforce_eager": False, "overlap_scheduling": "on"},
    "graphs": {"enforce_eager": False, "overlap_scheduling": "off"},
    "overlap": {"enforce_eager": True, "overlap_scheduling": "on"},
    "neither": {"enforce_eager": True, "overlap_scheduling": "off"},
}
SHAPE = "tinyllama-1.1b"
KV_CACHE_GIB = 9.0
ROW = Row("decode", "", "decode", 1, 32, 129, ())
REQUESTS, PROMPT, OUTPUT = 256, 512, 65


def cases(plan: Plan) -> list[Case]:
    # A CPU has neither graphs nor a queue to overlap with; the trial runs the code with what there is.
    names = ["neither"] if plan.tiny else list(SWITCHES)
    return [Case("overlap", SHAPE, "overlap", 110.0, partial(_measure, names))]


def _measure(names: Sequence[str], context: Context) -> dict[str, Any]:
    tiny = context.plan.tiny
    row = Row("decode", "", "decode", 1, 8, 33, ()) if tiny else ROW
    count, prompt, output = (2, 32, 33) if tiny else (REQUESTS, PROMPT, OUTPUT)
    single: dict[str, list[float]] = {name: [] for name in names}
    batch: dict[str, list[float]] = {name: [] for name in names}
    idle: dict[str, list[float | None]] = {name: [] for name in names}
    with _engines(names, context.plan) as engines:
        for name, engine in engines.items():
            row.measure(engine.generate, f"{name}/warm-up")
            decode_rates(engine, count, prompt, output, 1)
        for number, name in interleave(names, context.plan.rounds):
            single[name].append(row.measure(engines[name].generate, f"{name}/{number}"))
            before = engines[name].llm.stats
            batch[name] += decode_rates(engines[name], count, prompt, output, 1)[0]
            idle[name].append(idle_share(before, engines[name].llm.stats))
    return {"single": single, "batch": batch, "idle": idle, "requests": count}


@contextmanager
def _engines(names: Sequence[str], plan: Plan) -> Iterator[dict[str, Engine]]:
    engines: dict[str, Engine] = {}
    try:
        for name in names:
            more = {} if plan.tiny else SWITCHES[name] | {"kv_cache_gib": KV_CACHE_GIB}
            engines[name] = load(Setup(SHAPE), plan, **more)
        yield engines
    finally:
        for engine in engines.values():
            engine.shutdown()


def line(data: dict[str, Any], record: Record) -> str:
    return ", ".join(
        f"{name}: {median(values):,.0f}/{median(data['batch'][name]):,.0f}" for name, values in data["single"].items()
    )


def report(records: Sequence[Record]) -> list[str]:
    lines: list[str] = []
    for record in records:
        if record.data is None:
            continue
        data = record.data
        count = data["requests"]
        rows = [["", "1 request tok/s", "over neither", f"{count} requests tok/s", "over neither"]]
        rows[0] += ["GPU waits", *TARGET_HEAD]
        for name, values in data["single"].items():
            batch = data["batch"][name]
            rows.append(
                [
                    name,
                    median_and_range(values),
                    _over(values, data["single"].get("neither")),
                    median_and_range(batch),
                    _over(batch, data["batch"].get("neither")),
                    *_idle_cells([share for share in data["idle"][name] if share is not None]),
                ]
            )
        lines += [markdown_table(rows), ""]
    text = (
        f"{SHAPE} in bf16; four engines in one process, in turns; {REQUESTS} requests with {PROMPT} tokens of cached context. "
        "`GPU waits`: share of the time in which the GPU had no work although there were requests, by the engine's own marks in its queue: "
        "what the CPU does and does not hide."
    )
    return [text, "", *lines]


def _over(values: Sequence[float], base: Sequence[float] | None) -> str:
    return NONE if base is None or base is values else paired_ratio(values, base).text(2)


def _idle_cells(shares: Sequence[float]) -> list[str]:
    return [NONE] * 5 if not shares else [f"{median(shares):.1%}", *target_cells(CPU_SHARE, shares)]
