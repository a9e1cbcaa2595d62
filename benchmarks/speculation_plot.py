"""Speculation or batching? The figures of speculation.py as a picture: what the machine gives against what one request sees.

matplotlib is no dependency of Penstock: where it is not installed there is no picture, and the run says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

TITLES = {
    "draft": "draft model, stories",
    "ngram": "n-grams, requests that quote",
    "fresh": "n-grams, nothing to quote",
}
STYLES = {"off": ("#8a8f98", "no speculation"), "4": ("#c98b2b", "always 4"), "auto": ("#0b6e99", "auto")}


def draw(sections: dict[str, Any], target: Path) -> Path | None:
    """One panel for each section that was measured; every point is a number of requests at once. None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "No plot: matplotlib is not installed here (pip install matplotlib, then run again; nothing is measured twice)."
        )
        return None
    importlib.import_module("matplotlib").use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    names = [name for name in TITLES if name in sections]
    figure, panels = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.6), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        data = sections[name]["data"]
        for setting, (color, label) in STYLES.items():
            points = data[setting]
            machine = [points[requests]["tokens_per_second"] for requests in points]
            each = [points[requests]["request_tokens_per_second"] for requests in points]
            panel.plot(each, machine, marker="o", color=color, label=label)
            if setting == "off":
                for requests, x, y in zip(points, each, machine, strict=True):
                    panel.annotate(requests, (x, y), textcoords="offset points", xytext=(4, -11), fontsize=8)
        panel.set_title(TITLES[name])
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("tokens/s of one request (median)")
        panel.grid(visible=True, which="both", alpha=0.25)
    panels[0][0].set_ylabel("tokens/s of the machine")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    return target
