"""What the benchmark scripts share: models by name, command-line options, sections that survive an interruption, result files.

A script consists of sections. A finished section is written to results/ at once and skipped the next time (`--fresh` measures it again), so
an interrupted script goes on where it was. All conditions that are compared with each other are measured in the same section, in
turns; figures of different sections or runs are not to be compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from penstock.core.config import EMBEDDED_MODEL
from penstock.core.errors import PenstockError
from penstock.workbench.bench.client import Client, Target
from penstock.workbench.bench.environment import describe_environment
from penstock.workbench.bench.load import run_async
from penstock.workbench.bench.metrics import Distribution
from penstock.workbench.bench.report import align, markdown_table
from penstock.workbench.bench.server import ServerProcess, penstock_command

HERE = Path(__file__).resolve().parent
SHAPES = HERE / "shapes"
RESULTS = HERE / "results"
KV_CACHE_GIB = 1.0

Settings = dict[str, Any]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Model:
    """A model to measure. `settings`: fields of EngineConfig; `context`: its longest prompt plus output."""

    name: str
    settings: Settings
    context: int

    def serve_command(self, **more: Any) -> list[str]:
        """The command line of a server for it."""
        settings = self.settings | more
        return penstock_command("serve", settings["model"], *flags({k: v for k, v in settings.items() if k != "model"}))


def find_model(name: str, options: Options) -> Model:
    """'stories', a folder of shapes/ (random weights), or a path to a model folder."""
    common: Settings = {"kv_cache_gib": options.kv_cache_gib, "threads": options.threads}
    shape = SHAPES / name
    if name == EMBEDDED_MODEL:
        from penstock.hub import resolve_model

        folder, settings = resolve_model(name), {"model": name}
    elif (shape / "config.json").is_file():
        folder, settings = shape, {"model": str(shape), "load_format": "dummy"}
    else:
        folder, settings = Path(name), {"model": name}
    config = folder / "config.json"
    if not config.is_file():
        known = ", ".join(sorted(path.name for path in SHAPES.iterdir()))
        raise click.UsageError(f"No model {name!r}. Known: {EMBEDDED_MODEL}, {known}, or a folder with a config.json.")
    context = min(int(json.loads(config.read_text())["max_position_embeddings"]), 4096)
    return Model(name, settings | common | {"max_model_len": context}, context)


def flags(settings: Settings) -> list[str]:
    """Settings as command-line flags of `penstock serve`."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


@dataclass(frozen=True, slots=True)
class Options:
    """Options that every script has. `models` is empty when none was named."""

    quick: bool
    fresh: bool
    out: Path
    models: tuple[str, ...]
    rounds: int | None
    threads: int
    kv_cache_gib: float

    def choose(self, *defaults: str) -> list[str]:
        """The models to measure: those named, else the embedded one when quick, else the defaults."""
        return list(self.models) or ([EMBEDDED_MODEL] if self.quick else list(defaults))

    def repeat(self, rounds: int, quick: int) -> int:
        return self.rounds or (quick if self.quick else rounds)


def script_options(function: Callable[[Options], None]) -> click.Command:
    """Make a click command of a script's main function."""

    @click.command(help=function.__doc__)
    @click.option("--quick", is_flag=True, help="A smoke run of under a minute on the embedded model; decides nothing.")
    @click.option("--fresh", is_flag=True, help="Measure finished sections again.")
    @click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=True)
    @click.option("--model", "models", multiple=True, help="'stories', a folder of shapes/, or a path; repeatable.")
    @click.option("--rounds", type=click.IntRange(min=1), help="Interleaved repetitions.")
    @click.option("--threads", default=0, show_default=True, help="CPU threads of the engine; 0: all cores.")
    @click.option("--kv-cache-gib", default=KV_CACHE_GIB, show_default=True, help="KV cache of each engine.")
    def command(**values: Any) -> None:
        try:
            function(Options(**values))
        except PenstockError as error:
            raise click.ClickException(str(error)) from error

    return command


@dataclass(slots=True)
class Results:
    """The results of one script: sections by name, in one JSON file, and a Markdown table beside it."""

    name: str
    options: Options
    sections: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists() and not self.options.fresh:
            self.sections = json.loads(self.path.read_text())["sections"]

    @property
    def path(self) -> Path:
        return self.options.out / f"{self.name}{'-quick' if self.options.quick else ''}.json"

    def section(self, name: str, measure: Callable[[], Any]) -> Any:
        """The data of a section, measured now unless a former run finished it."""
        if name in self.sections:
            print(f"[{name}] from {self.sections[name]['environment']['date']} (--fresh measures again)", flush=True)
            return self.sections[name]["data"]
        print(f"[{name}]", flush=True)
        environment, started = describe_environment(), time.perf_counter()
        data = msgspec.to_builtins(measure())
        self.sections[name] = {
            "environment": msgspec.to_builtins(environment),
            "commit": commit(),
            "seconds": round(time.perf_counter() - started, 1),
            "data": data,
        }
        self.options.out.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed, so that an interruption leaves the former file whole.
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps({"schema": 1, "name": self.name, "sections": self.sections}, indent=2) + "\n")
        os.replace(draft, self.path)
        return data

    def publish(self, rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
        """Print the table and write it as Markdown."""
        environments = [section["environment"] for section in self.sections.values()]
        machine = sorted({f"{e['cpu']}, {e['cores']} cores, {e['date'][:10]}" for e in environments})
        lines = [*notes, *(f"Machine: {text}." for text in machine)]
        print(f"\n{align(rows)}\n", *lines, sep="\n")
        self.path.with_suffix(".md").write_text("\n".join([markdown_table(rows), "", *lines, ""]))


def start_server(model: Model, **settings: Any) -> ServerProcess:
    """A server for the model, to be entered."""
    return ServerProcess(model.serve_command(log_level="warning", **settings), timeout_s=600.0)


def served_name(url: str) -> str:
    """The name under which a server serves its model."""

    async def names() -> list[str]:
        async with Client(Target(url=url, model="")) as client:
            return await client.models()

    return run_async(names())[0]


def milliseconds(values: Distribution | None, name: str) -> str:
    """One figure of a distribution for a table."""
    return "–" if values is None else f"{getattr(values, name) * 1000:.1f}"


def commit() -> str:
    """The checkout's commit, with + when tracked files differ; "" outside of a checkout and without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
