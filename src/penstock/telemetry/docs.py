"""Makes docs/metrics.md from the table: `python -m penstock.telemetry.docs > docs/metrics.md`."""

from __future__ import annotations

import sys

from penstock.telemetry.metrics import METRICS, Metric

_INTRODUCTION = """# Metrics

This page is made from `src/penstock/telemetry/metrics.py` by `python -m penstock.telemetry.docs`; a test keeps it current.

`GET /metrics` answers in the Prometheus text format. Times are seconds, sizes are bytes. Label values come from bounded sets, so
clients cannot create series. Engine metrics count from the engine's start and begin again when the engine restarts; Prometheus's
`rate()` and `increase()` handle that.
"""


def metrics_page() -> str:
    """The page as Markdown."""
    parts = [_INTRODUCTION]
    for source, title in (("gateway", "Gateway"), ("engine", "Engine")):
        parts.append(f"## {title}\n\n| name | type | labels | meaning |\n|---|---|---|---|")
        parts[-1] += "".join("\n" + _row(metric) for metric in METRICS if metric.source == source) + "\n"
    parts.append("## Buckets\n")
    histograms = [metric for metric in METRICS if metric.kind == "histogram"]
    parts[-1] += "".join(
        f"\n- `{metric.name}`: {', '.join(f'{bound:g}' for bound in metric.buckets)}" for metric in histograms
    )
    return "\n".join(parts) + "\n"


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
