"""The figures as a picture: per shape one group of bars for each row and precision, one bar for each engine, relative to the best peer.

matplotlib is no dependency of Penstock: where it is not installed there is no picture, and the run says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.report import ENGINE, best_peer

COLORS = {
    "penstock": "#0b6e99",
    "openvino": "#c98b2b",
    "llama.cpp": "#8a8f98",
    "vllm": "#7a5c9e",
    "transformers": "#b5b9bf",
}


def relative(section: dict[str, Any], row: str) -> dict[str, float]:
    """Engine → its median in a row over that of the best peer (of Penstock when there is no peer)."""
    results = {result["engine"]: result for result in section["results"] if row in result["samples"]}
    if not results:
        return {}
    reference = best_peer(row, results, [key for key in results if key != ENGINE]) or ENGINE
    unit = statistics.median(results[reference]["samples"][row])
    return {key: statistics.median(result["samples"][row]) / unit for key, result in results.items()}


def draw(source: Path, target: Path, rows: Sequence[str]) -> Path | None:
    """Draw the JSON at `source` as PNG. None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "No plot: matplotlib is not installed here (pip install matplotlib, then run again; nothing is measured twice)."
        )
        return None
    importlib.import_module("matplotlib").use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    sections = {name: section["data"] for name, section in json.loads(source.read_text())["sections"].items()}
    shapes = list(dict.fromkeys(name.partition(" ")[0] for name in sections))
    figure, panels = plt.subplots(len(shapes), 1, figsize=(11, 3.4 * len(shapes)), squeeze=False)
    for panel, shape in zip(panels[:, 0], shapes, strict=True):
        _draw_shape(
            panel, shape, {n.partition(" ")[2]: s for n, s in sections.items() if n.startswith(shape + " ")}, rows
        )
    panels[0, 0].legend(loc="upper right", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


def _draw_shape(panel: Any, shape: str, sections: dict[str, Any], rows: Sequence[str]) -> None:
    groups = [
        (f"{row}\n{precision}", values)
        for row in rows
        for precision, s in sections.items()
        if (values := relative(s, row))
    ]
    seen: set[str] = set()
    for number, (_, values) in enumerate(groups):
        width = 0.8 / len(values)
        for place, (engine, value) in enumerate(values.items()):
            label = None if engine in seen else engine
            seen.add(engine)
            left = number - 0.4 + (place + 0.5) * width
            panel.bar(left, value, width * 0.92, color=COLORS[engine], label=label)
    panel.axhline(1.0, color="#444444", linewidth=0.8)
    panel.set_xticks(range(len(groups)), [name for name, _ in groups], fontsize=7)
    panel.set_ylabel("tok/s over best peer", fontsize=8)
    panel.set_title(shape, fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
