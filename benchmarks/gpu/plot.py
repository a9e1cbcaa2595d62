"""The speed of prefill attention over the length of the prompt, as a picture: PNG with matplotlib, else SVG written by hand."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.gpu.records import Record, write_atomically

COLORS = ("#0b6e99", "#c98b2b", "#8a8f98", "#7a5c9e", "#4d8f5b")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 70, 48, 34, 190

Series = Mapping[str, Sequence[tuple[float, float]]]


def draw_prefill_attention(records: Sequence[Record], stem: Path) -> Path | None:
    """Write STEM.png or STEM.svg; None when there is nothing to draw."""
    series = prefill_series(records)
    if not series:
        return None
    if importlib.util.find_spec("matplotlib") is not None:
        return _with_matplotlib(series, stem.with_name(stem.name + ".png"))
    target = stem.with_name(stem.name + ".svg")
    write_atomically(target, svg(series, "prompt tokens", "TFLOP/s", "Causal prefill attention, one layer"))
    return target


def prefill_series(records: Sequence[Record]) -> dict[str, list[tuple[float, float]]]:
    """Name → (tokens, TFLOP/s), for every shape and implementation that was measured."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.section != "prefill_attention" or record.data is None:
            continue
        for figure in record.data["figures"]:
            for name, seconds in figure["seconds"].items():
                point = (float(figure["rows"]), figure["operations"] / sorted(seconds)[len(seconds) // 2] / 1e12)
                series.setdefault(f"{name or 'Penstock'}, {record.case}", []).append(point)
    return {name: sorted(points) for name, points in series.items()}


def svg(series: Series, x_title: str, y_title: str, title: str) -> str:
    """Lines over a logarithmic horizontal axis (base 2) and a linear vertical one that begins at 0."""
    points = [point for line in series.values() for point in line]
    low, high = (math.log2(edge([x for x, _ in points])) for edge in (min, max))
    top = max(y for _, y in points) * 1.08
    span = max(high - low, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (math.log2(x) - low) / span * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>',
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">{escape(y_title)}</text>',
    ]
    for x in sorted({x for x, _ in points}):
        across, down = place(x, 0)
        parts.append(f'<text x="{across:.1f}" y="{down + 16:.1f}" text-anchor="middle">{x:,.0f}</text>')
    for step in range(5):
        y = top * step / 4
        across, down = place(2**low, y)
        parts.append(f'<line x1="{across:.1f}" y1="{down:.1f}" x2="{WIDTH - RIGHT}" y2="{down:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{across - 6:.1f}" y="{down + 4:.1f}" text-anchor="end">{y:,.3g}</text>')
    for number, (name, line) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in (place(x, y) for x, y in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{TOP + 16 * number + 10}" fill="{color}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _with_matplotlib(series: Series, target: Path) -> Path:
    importlib.import_module("matplotlib").use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    figure, panel = plt.subplots(figsize=(9, 4.5))
    for number, (name, line) in enumerate(series.items()):
        panel.plot(*zip(*line, strict=True), marker="o", color=COLORS[number % len(COLORS)], label=name)
    panel.set_xscale("log", base=2)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("prompt tokens")
    panel.set_ylabel("TFLOP/s")
    panel.set_title("Causal prefill attention, one layer", loc="left", fontsize=10)
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target
