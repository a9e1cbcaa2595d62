"""Results of all shapes and precisions as a Markdown table: figures, ratios, shares of the ceiling, and what each engine really ran."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.cpu.budget import Shape
from benchmarks.cpu.measure import MEMORY, STARTUP
from benchmarks.cpu.rows import Row, machine_ceilings

from penstock.workbench.bench.compare import MIN_PAIRS, paired_ratio
from penstock.workbench.bench.report import markdown_table

ENGINE = "penstock"
SMALLER_IS_BETTER = (STARTUP, MEMORY)
# Two measurements of the same ceiling that differ by more have measured other processes.
QUIET_SHARE = 0.85
OTHER_ROWS = {STARTUP: "start to first token, s", MEMORY: "peak memory at 32 requests, GB"}


def shape_table(shape: str, sections: dict[str, dict[str, Any]], rows: Sequence[Row]) -> str:
    """One table. `sections`: precision → what compare.py stored for it."""
    names = _engine_names(sections)
    peers = [key for key in names if key != ENGINE]
    head = [
        "",
        "Penstock",
        *(names[key] for key in peers),
        "Penstock / best peer",
        "decided",
        "ceiling",
        "Penstock / ceiling",
    ]
    lines = [head]
    titles = {row.key: row.title for row in rows} | OTHER_ROWS
    for key, title in titles.items():
        for precision, section in sections.items():
            results = {result["engine"]: result for result in section["results"]}
            if any(key in result["samples"] for result in results.values()):
                row = next((row for row in rows if row.key == key), None)
                ceiling = None if row is None else row_ceiling(row, shape, precision, section)
                lines.append([f"{title}, {precision}", *_cells(key, results, peers, ceiling)])
    return f"**{shape}**\n\n{markdown_table(lines)}"


def row_ceiling(row: Row, shape: str, precision: str, section: dict[str, Any]) -> float:
    """Tokens per second that the ceilings of this section's own run allow: the higher of before and after, because what another
    process takes while one of them is measured is no property of the machine."""
    limits = [row.ceiling(Shape.read(shape), precision, machine_ceilings(c, precision)) for c in section["ceilings"]]
    return max(limits)


def best_peer(key: str, results: dict[str, Any], peers: Sequence[str]) -> str | None:
    """The peer with the best median in a row."""
    medians = {
        p: statistics.median(results[p]["samples"][key]) for p in peers if p in results and key in results[p]["samples"]
    }
    if not medians:
        return None
    return min(medians, key=medians.__getitem__) if key in SMALLER_IS_BETTER else max(medians, key=medians.__getitem__)


def _cells(key: str, results: dict[str, Any], peers: Sequence[str], ceiling: float | None) -> list[str]:
    best = best_peer(key, results, peers)
    own = results.get(ENGINE, {}).get("samples", {}).get(key)
    cells = [_figure(key, results, ENGINE)]
    cells += [f"**{text}**" if peer == best else text for peer in peers for text in [_figure(key, results, peer)]]
    cells += ["–", "–"] if own is None or best is None else _ratio(key, own, results[best]["samples"][key])
    limit = "–" if ceiling is None else f"{ceiling:.4g}"
    share = "–" if ceiling is None or own is None else f"{statistics.median(own) / ceiling:.0%}"
    return [*cells, limit, share]


def _figure(key: str, results: dict[str, Any], engine: str) -> str:
    """Median and range, or why there is none."""
    result = results.get(engine)
    if result is None:
        return ""
    values = result["samples"].get(key)
    if values is None:
        return "failed" if result["problems"] else "–"
    scaled = [value / 1e9 if key == MEMORY else value for value in values]
    middle = _short(statistics.median(scaled))
    if len(scaled) == 1:
        return middle
    few = f", n={len(scaled)}" if len(scaled) < MIN_PAIRS else ""
    return f"{middle} ({_short(min(scaled))}–{_short(max(scaled))}{few})"


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _ratio(key: str, own: Sequence[float], peer: Sequence[float]) -> list[str]:
    """Penstock over the best peer, round by round, and whether the two differ by more than the rounds among themselves."""
    pairs = min(len(own), len(peer))
    ratio = paired_ratio(own[:pairs], peer[:pairs])
    if pairs == 1:
        return [f"{ratio.median:.2f}", "single value"]
    verdict = ratio.below(1.0)
    if verdict != "undecided":
        smaller = verdict == "yes"
        verdict_text = "better" if smaller == (key in SMALLER_IS_BETTER) else "worse"
    else:
        verdict_text = "undecided"
    return [f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})", verdict_text]


def _engine_names(sections: dict[str, dict[str, Any]]) -> dict[str, str]:
    names = {ENGINE: "Penstock"}
    for section in sections.values():
        names |= {result["engine"]: result["name"] for result in section["results"]}
    return names


def notes(sections: dict[str, dict[str, Any]]) -> list[str]:
    """What every engine computed with, its versions, and what went wrong. `sections`: "SHAPE PRECISION" → data."""
    lines: dict[str, None] = {}
    for name, section in sections.items():
        precision = name.partition(" ")[2]
        for result in section["results"]:
            more = f", {result['notes']}" if result["notes"] else ""
            lines[
                f"- {result['name']}, {precision}: weights {result['weights']}; KV cache {result['kv_cache']}{more}."
            ] = None
        for result in section["results"]:
            for what, problem in result["problems"].items():
                lines[f"- {result['name']}, {name}: {what} failed: {problem[:300]}"] = None
            if result["idle_cpu"] > 0.05:
                lines[f"- {result['name']}, {name}: takes {result['idle_cpu']:.0%} of a core while idle."] = None
    versions = {
        f"{package} {version}"
        for section in sections.values()
        for result in section["results"]
        for package, version in result["versions"].items()
    }
    return [*lines, f"- Versions: {', '.join(sorted(versions))}."]


def ceilings_text(name: str, section: dict[str, Any]) -> str:
    """Both measurements of the ceilings around one section."""
    parts = []
    for measured in section["ceilings"]:
        peaks = measured["all_threads"]
        peak_texts = [f"{peaks['read_gb_s']:.1f} GB/s", f"{peaks['float32_gflops']:.0f} GFLOPS float32"]
        if peaks["int8_gops"]:
            peak_texts.append(f"{peaks['int8_gops']:.0f} GOPS int8")
        if peaks["bfloat16_gflops"]:
            peak_texts.append(f"{peaks['bfloat16_gflops']:.0f} GFLOPS bfloat16")
        parts.append(", ".join(peak_texts))
    reads = [measured["all_threads"]["read_gb_s"] for measured in section["ceilings"]]
    quiet = "" if min(reads) > QUIET_SHARE * max(reads) else " The machine was busy: do not trust this section."
    return f"- Ceilings around {name}: {'; afterwards '.join(parts)}.{quiet}"
