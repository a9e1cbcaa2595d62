"""Results as JSON (the structs below, version 1) and as an aligned table for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock.workbench.bench.environment import Environment
from penstock.workbench.bench.metrics import Distribution, LoadMetrics, Objectives

SCHEMA = 1


class ServeReport(msgspec.Struct, frozen=True, kw_only=True):
    """A run against a server. `settings`: everything needed to repeat it, without the API key. `client_cpu_share`: the generator's CPU
    seconds per second of the run; near 1 the generator, not the server, was measured. `samples`: one server text per kind of error.
    """

    schema: int = SCHEMA
    kind: Literal["serve"] = "serve"
    environment: Environment
    settings: dict[str, Any]
    objectives: Objectives
    metrics: LoadMetrics
    samples: dict[str, str]
    client_cpu_s: float
    client_cpu_share: float


class OfflineReport(msgspec.Struct, frozen=True, kw_only=True):
    """Throughput of `penstock.LLM`. `prefill_throughput`: prompt tokens per second of a batch with one output token each;
    `output_throughput`: output tokens per second of the whole batch, prefill included."""

    schema: int = SCHEMA
    kind: Literal["offline"] = "offline"
    environment: Environment
    settings: dict[str, Any]
    load_s: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    prefill_s: float
    total_s: float
    prefill_throughput: float
    output_throughput: float
    total_throughput: float
    cpu_s: float


class StartupReport(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from exec to the first ready answer, and of a bare `import torch`, taken in turns. `difference`: server − torch,
    pair by pair."""

    schema: int = SCHEMA
    kind: Literal["startup"] = "startup"
    environment: Environment
    settings: dict[str, Any]
    server_s: list[float]
    torch_s: list[float]
    difference_median_s: float
    difference_low_s: float
    difference_high_s: float


Report = ServeReport | OfflineReport | StartupReport


def to_json(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=2)


def write_json(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_json(report) + b"\n")


def align(rows: Sequence[Sequence[str]]) -> str:
    """A table: the first row is the header, the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same rows as a Markdown table."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])


def serve_table(report: ServeReport) -> str:
    """What happened, the latencies in milliseconds, and what to know before believing them."""
    metrics = report.metrics
    latencies: list[tuple[str, Distribution | None]] = [
        ("TTFT ms", metrics.ttft),
        ("ITL ms", metrics.itl),
        ("event gap ms", metrics.event_gap),
        ("TPOT ms", metrics.tpot),
        ("E2E ms", metrics.e2e),
        ("sent late ms", metrics.lag),
    ]
    rows = [["", "mean", "p50", "p90", "p95", "p99", "max"]]
    rows += [[name, *_milliseconds(values)] for name, values in latencies if values is not None]
    return "\n".join([*_serve_summary(report), "", align(rows), "", *_serve_notes(report)])


def _serve_summary(report: ServeReport) -> list[str]:
    metrics = report.metrics
    lines = [
        f"load        {report.settings.get('load', '')}",
        f"requests    {metrics.completed} completed, {metrics.failed} failed in {metrics.duration_s:.2f} s "
        f"({metrics.request_throughput:.2f}/s)",
        f"tokens      {metrics.prompt_tokens} in, {metrics.output_tokens} out "
        f"({metrics.output_throughput:.1f} out/s, {metrics.total_throughput:.1f} total/s)",
    ]
    if metrics.goodput is not None and metrics.goodput_share is not None:
        lines.append(
            f"goodput     {metrics.goodput:.2f}/s ({metrics.goodput_share:.1%} of requests met all objectives)"
        )
    if metrics.cached_share is not None:
        lines.append(f"prefix      {metrics.cached_share:.1%} of prompt tokens came from the server's cache")
    lines += [
        f"error       {count} × {kind}: {report.samples.get(kind, '')[:120]}" for kind, count in metrics.errors.items()
    ]
    return lines


def _serve_notes(report: ServeReport) -> list[str]:
    metrics = report.metrics
    lines = [f"generator   {report.client_cpu_s:.2f} CPU s ({report.client_cpu_share:.1%} of one core during the run)"]
    if metrics.exact_arrivals < metrics.completed:
        inexact = metrics.completed - metrics.exact_arrivals
        lines.append(f"note        {inexact} streams do not say how many tokens an event holds: their ITL is per event")
    if metrics.asked_length < metrics.completed:
        lines.append(f"note        {metrics.completed - metrics.asked_length} outputs are not of the length asked for")
    return lines


def _milliseconds(values: Distribution) -> list[str]:
    return [
        f"{seconds * 1000:.1f}" for seconds in (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)
    ]


def offline_table(report: OfflineReport) -> str:
    rows = [
        ["", "tokens", "seconds", "tokens/s"],
        ["prefill", str(report.prompt_tokens), f"{report.prefill_s:.2f}", f"{report.prefill_throughput:.1f}"],
        ["output", str(report.output_tokens), f"{report.total_s:.2f}", f"{report.output_throughput:.1f}"],
        [
            "prompt + output",
            str(report.prompt_tokens + report.output_tokens),
            f"{report.total_s:.2f}",
            f"{report.total_throughput:.1f}",
        ],
    ]
    return f"{report.requests} requests; loaded in {report.load_s:.2f} s\n\n{align(rows)}"


def startup_table(report: StartupReport) -> str:
    pairs = zip(report.server_s, report.torch_s, strict=True)
    rows = [["run", "server ready s", "import torch s", "difference s"]]
    rows += [
        [str(i + 1), f"{server:.2f}", f"{torch:.2f}", f"{server - torch:.2f}"]
        for i, (server, torch) in enumerate(pairs)
    ]
    spread = f"{report.difference_low_s:.2f} to {report.difference_high_s:.2f}"
    return f"{align(rows)}\n\nready {report.difference_median_s:.2f} s after a bare import torch (median; {spread})"
