"""Penstock beside llama.cpp, OpenVINO GenAI, vLLM's CPU build and transformers, on this machine, in one command.

    benchmarks/cpu/compare [--quick] [--only llama.cpp --only penstock] [--rounds 5]

Installs each peer into an environment of its own (once), draws checkpoints (once), and measures engines of the same precision in turns,
with the machine's ceilings before and after. Results: benchmarks/results/cpu_compare.json, .md and .png. An interrupted run goes on with
the sections that are missing; --fresh measures all again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
from benchmarks.common import RESULTS, Options, Results
from benchmarks.cpu.checkpoints import HERE, Checkpoints
from benchmarks.cpu.engines import KV_BYTES, PRECISIONS, Conditions, Setup, setups
from benchmarks.cpu.measure import Bench, measure
from benchmarks.cpu.peers import PEERS, Found, find
from benchmarks.cpu.plot import draw
from benchmarks.cpu.report import ceilings_text, notes, shape_table
from benchmarks.cpu.rows import QUICK_ROWS, ROWS, Row
from benchmarks.cpu.served import measure_http
from tqdm import tqdm

from penstock.core.errors import PenstockError
from penstock.workbench.bench.load import BenchmarkError
from penstock.workbench.bench.server import penstock_command

DEFAULT_SHAPES = ("tinyllama-1.1b", "qwen2.5-0.5b")
DEFAULT_PRECISIONS = ("int8", "int4 g128", "bf16")
QUICK_ROUNDS = 2
MAX_MODEL_LEN = 1024


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Two rounds of small requests in the smaller shape; decides nothing.")
@click.option("--fresh", is_flag=True, help="Measure finished sections again.")
@click.option("--only", multiple=True, type=click.Choice(list(PEERS)), help="Engines to measure; repeatable.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(DEFAULT_SHAPES), help="Shapes; repeatable.")
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), help="Precisions; repeatable.")
@click.option("--rounds", type=click.IntRange(min=1), help="Interleaved repetitions (default: 5).")
@click.option("--threads", default=2, show_default=True, help="Threads of each engine.")
@click.option("--kv-cache-dtype", type=click.Choice(list(KV_BYTES)), help="KV cache of engines that let one choose it.")
@click.option(
    "--http/--no-http", default=True, show_default=True, help="Also measure Penstock's server with streaming."
)
@click.option("--install/--no-install", default=True, show_default=True, help="Install peers that are missing.")
@click.option(
    "--peers-dir", type=click.Path(path_type=Path), default=HERE / ".peers", help="Environments of the peers."
)
@click.option("--models-dir", type=click.Path(path_type=Path), default=HERE / ".models", help="Checkpoints.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=True)
def main(**values: Any) -> None:
    try:
        run(values)
    except PenstockError as error:
        raise click.ClickException(str(error)) from error


def run(values: dict[str, Any]) -> None:
    """Everything; `values`: the command's options."""
    quick: bool = values["quick"]
    rows = QUICK_ROWS if quick else ROWS
    shapes = values["shapes"] or (DEFAULT_SHAPES[-1:] if quick else DEFAULT_SHAPES)
    precisions = values["precisions"] or DEFAULT_PRECISIONS
    rounds = values["rounds"] or (QUICK_ROUNDS if quick else 5)
    conditions = Conditions(
        threads=values["threads"],
        kv_cache_dtype=values["kv_cache_dtype"] or default_kv_cache_dtype(Path("/proc/cpuinfo").read_text()),
        kv_tokens=max(row.tokens() for row in rows) + 32 * 32,
        max_num_seqs=max(row.requests for row in rows),
        max_model_len=MAX_MODEL_LEN,
    )
    keys = values["only"] or tuple(PEERS)
    found = {key: find(key, values["peers_dir"].resolve(), install=values["install"], say=print) for key in keys}
    for peer in found.values():
        if peer.python is None:
            print(f"{peer.peer.name} {peer.reason}")
    options = Options(quick, values["fresh"], values["out"], shapes, rounds, values["threads"], 0.0)
    results = Results("cpu_compare", options)
    for shape in shapes:
        checkpoints = Checkpoints(shape, values["models_dir"].resolve())
        for precision in precisions:
            wanted = [
                setup for setup in setups(precision, conditions) if setup.key in found and found[setup.key].python
            ]
            chosen = [row for row in rows if precision in row.precisions]
            section = Section(checkpoints, conditions, found, wanted, chosen, rounds, values["out"] / "logs")
            results.section(f"{shape} {precision}", partial(section.measure, http=values["http"]))
    publish(results, rows, found, values["models_dir"].resolve())


class Section:
    """All engines of one precision in one shape."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        conditions: Conditions,
        found: dict[str, Found],
        wanted: list[Setup],
        rows: list[Row],
        rounds: int,
        logs: Path,
    ) -> None:
        self._checkpoints, self._conditions, self._found = checkpoints, conditions, found
        self._wanted, self._rows, self._rounds, self._logs = wanted, rows, rounds, logs

    def measure(self, *, http: bool) -> dict[str, Any]:
        """The section's data as it is stored."""
        startup = self._wanted[0].precision == "int8" if self._wanted else False
        asks = len(self._wanted) * (self._rounds * len(self._rows) + 1 + startup * (self._rounds + 1))
        before = measure_ceilings(self._conditions.threads)
        with tqdm(total=asks, unit="ask", dynamic_ncols=True) as bar:

            def progress(what: str) -> None:
                bar.set_postfix_str(what, refresh=False)
                bar.update()

            def sampled(row: str, engine: str, value: float) -> None:
                bar.write(f"  {row:10} {engine:16} {value:10.2f}")

            bench = Bench(self._checkpoints, self._conditions, self._found, self._rounds, self._logs, progress, sampled)
            results = measure(bench, self._wanted, self._rows, startup=startup)
        served = [row for row in self._rows if row.kind == "served"]
        own = next((result for result in results if result.setup.key == "penstock"), None)
        through_http: dict[str, Any] = {}
        if http and served and own is not None and not own.problems:
            try:
                through_http = measure_http(bench, own.setup, served)
            except BenchmarkError as error:
                own.problems["HTTP"] = str(error)
        after = measure_ceilings(self._conditions.threads)
        return {"ceilings": [before, after], "results": [result.as_dict() for result in results], "http": through_http}


def default_kv_cache_dtype(cpuinfo: str) -> str:
    """The widest type that all engines can keep: OpenVINO insists on bfloat16 where the processor computes in it, else float32."""
    return "bfloat16" if "avx512_bf16" in cpuinfo else "float32"


def measure_ceilings(threads: int) -> dict[str, Any]:
    """What `penstock bench ceilings` finds, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ceilings.json"
        command = penstock_command("bench", "ceilings", "--threads", str(threads), "--json", str(path))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"`penstock bench ceilings` fails: {done.stderr.strip()[-300:]}")
        measured: dict[str, Any] = json.loads(path.read_text())
        return measured


def publish(results: Results, rows: tuple[Row, ...], found: dict[str, Found], models: Path) -> None:
    """Markdown beside the JSON, and the plot where matplotlib can be had."""
    data = {name: section["data"] for name, section in results.sections.items()}
    by_shape: dict[str, dict[str, Any]] = {}
    for name, section in data.items():
        shape, _, precision = name.partition(" ")
        by_shape.setdefault(shape, {})[precision] = section
    environment = next(iter(results.sections.values()))["environment"]
    missing = [f"- {peer.peer.name} {peer.reason}." for peer in found.values() if peer.python is None]
    lines = [
        "# Penstock beside other engines on a CPU",
        "",
        f"{environment['date'][:10]}, {environment['cpu']}, {environment['cores']} cores, {environment['system']}. Random weights,",
        "unique prompts, no prefix cache, greedy, outputs of exact length; engines in-process, measured in turns. Median (lowest–highest)",
        "of the rounds in tokens per second; bold: the best peer. A ratio is undecided when its interval over the rounds holds 1.",
        "",
    ]
    for shape, sections in by_shape.items():
        lines += [shape_table(shape, sections, rows), "", *http_lines(sections), ""]
    lines += [
        "What ran:",
        "",
        *notes(data),
        *missing,
        *(ceilings_text(name, section) for name, section in data.items()),
        "",
    ]
    path = results.path.with_suffix(".md")
    path.write_text("\n".join(lines))
    print("\n".join(lines))
    plotted = draw(results.path, results.path.with_suffix(".png"), [row.key for row in rows])
    print(f"Written: {results.path}, {path}" + (f", {plotted}" if plotted else ""))


def http_lines(sections: dict[str, Any]) -> list[str]:
    """Penstock through HTTP with streaming against its engine alone, round by round."""
    lines = []
    for precision, section in sections.items():
        for title, entry in section["http"].items():
            lines.append(
                f"- {title}, {precision}, through HTTP with streaming: {entry['median']:.1f} tok/s, {entry['ratio']} of the engine alone; "
                f"the client took {entry['client_cpu_share']:.1%} of one core."
            )
    return lines


if __name__ == "__main__":
    main(standalone_mode=True, args=sys.argv[1:])
