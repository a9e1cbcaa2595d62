"""The command group. Commands are imported when they run, so that `penstock --help` costs nothing but click."""

from __future__ import annotations

import importlib
from typing import NoReturn

import click

from penstock.cli.options import debug_option

# name → (where its click command is, what the overview says)
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("penstock.cli.serve:serve", "Serve a model through the OpenAI-compatible API."),
    "worker": ("penstock.cli.worker:worker", "Offer this machine's GPUs or CPU to an engine on another one."),
    "chat": ("penstock.cli.chat:chat", "Chat in the terminal, with a server or a model in this process."),
    "generate": ("penstock.cli.generate:generate", "Complete a file of prompts offline; JSON lines out."),
    "pull": ("penstock.cli.pull:pull", "Download a model from the Hugging Face hub into a plain folder."),
    "verify": ("penstock.cli.verify:verify", "Compare a model's logits and greedy tokens with transformers."),
    "quantize": (
        "penstock.cli.quantize:quantize",
        "Write a quantised copy of a model, with a report of what it costs.",
    ),
    "eval": ("penstock.cli.eval_command:evaluate", "Measure the perplexity of a text, or the distance of two models."),
    "bench": ("penstock.cli.bench:bench", "Measure throughput and latency of an engine or a server."),
    "usage": ("penstock.cli.usage:usage", "Print requests, tokens and cost by day, key, tenant or model."),
    "keys": ("penstock.cli.keys:keys", "Make, list, rotate and revoke API keys."),
    "db": ("penstock.cli.db:db", "Upgrade or check the account database."),
    "doctor": ("penstock.cli.doctor:doctor", "Say what this machine has, what is missing and how to get it."),
    "version": ("penstock.cli.version:version", "Print the version."),
}

EPILOG = """\
\b
Start here:
  penstock serve                       the embedded model on port 8000
  penstock serve ./TinyLlama-1.1B-Chat a local Hugging Face folder
  penstock chat --url http://localhost:8000
  penstock COMMAND --help
"""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module_name), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module_name}:{attribute} is not a click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            fail_unknown_command(ctx, args[0])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def fail_unknown_command(ctx: click.Context, name: str) -> NoReturn:
    """Raise a UsageError that suggests the closest command."""
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    suggestion = f" Did you mean '{close[0]}'?" if close else f" Commands: {', '.join(COMMANDS)}."
    raise click.UsageError(f"No such command '{name}'.{suggestion}", ctx)


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    params=[debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="penstock", message="penstock %(version)s")
def cli() -> None:
    """Penstock: an LLM inference engine and the production gateway around it."""
