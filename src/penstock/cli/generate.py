"""`penstock generate`: prompts from a file or stdin, JSON lines out, in the order of the input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from penstock.cli.options import SettingsCommand, config_from, with_settings
from penstock.cli.sampling import sampling_fields, sampling_params, with_sampling
from penstock.core.config import EMBEDDED_MODEL, EngineConfig


@click.command(cls=SettingsCommand)
@click.argument("model", default=EMBEDDED_MODEL, envvar="PENSTOCK_MODEL")
@click.option(
    "-i",
    "--input",
    "source",
    default="-",
    help="Prompts: FILE.txt (one per line), FILE.jsonl, or - for stdin.",
    show_default=True,
)
@click.option("-o", "--output", "target", default="-", help="Where the JSON lines go; - for stdout.", show_default=True)
@click.option(
    "--format",
    "input_format",
    type=click.Choice(["auto", "txt", "jsonl"]),
    default="auto",
    show_default=True,
    help="'auto' goes by the file's ending; stdin is jsonl when its first line starts with {.",
)
@click.option(
    "--chat/--no-chat", default=False, help="Put plain prompts through the model's chat template.", show_default=True
)
@with_sampling(max_tokens=256)
# --seed means sampling here; the engine's seed of dummy weights stays at its default.
@with_settings(EngineConfig, without=frozenset({"seed"}))
def generate(source: str, target: str, input_format: str, chat: bool, **values: Any) -> int:
    """Complete many prompts offline with MODEL.

    A .txt file has one prompt per line. A .jsonl line is an object with "prompt" (text or token ids) or "messages", an
    optional "id", and any sampling parameter, which then beats the flag: {"prompt": "Once", "temperature": 0, "max_tokens": 20}.

    Each output line has id, text, prompt_tokens, completion_tokens, cached_tokens and finish_reason, or id and error: a wrong
    line fails alone. The exit code is 1 when a line failed.
    """
    import asyncio

    from penstock.cli import batch
    from penstock.cli.pull import ensure_model

    defaults = sampling_fields(values)
    sampling_params(defaults)  # a wrong flag is told now, not once per line
    config = config_from(EngineConfig, values)
    ensure_model(config.model, config.revision)
    lines = batch.read_lines(_open_input(source), source, input_format)
    jobs = batch.parse_jobs(lines, defaults, chat=chat)
    if target == "-":
        failed = asyncio.run(batch.run(config, jobs, sys.stdout))
    else:
        with Path(target).open("w", encoding="utf-8") as output:
            failed = asyncio.run(batch.run(config, jobs, output))
    return 1 if failed else 0


def _open_input(source: str) -> str:
    """The whole input as text."""
    if source == "-":
        if sys.stdin.isatty():
            click.echo("Reading prompts from the terminal, one per line; end with Ctrl-D.", err=True)
        return sys.stdin.read()
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{source} is not UTF-8 text.") from error
    except OSError as error:
        raise click.UsageError(f"Cannot read {source}: {error.strerror}.") from error
