"""Makes docs/configuration.md from the configuration classes: `python -m penstock.cli.reference > docs/configuration.md`."""

from __future__ import annotations

import dataclasses
import sys
import typing
from typing import Any

from penstock.cli.options import ConfigClass, environment_variable, sections_of
from penstock.core.config import EngineConfig, ServerConfig, flag_name
from penstock.core.gateway_config import GatewayConfig

_INTRODUCTION = """# Configuration

This page is made from `src/penstock/core/config.py` and `gateway_config.py` by `python -m penstock.cli.reference`; a test keeps it current.

Every setting is a flag of `penstock serve`; those of the engine are also flags of `penstock generate` and `penstock chat` and keyword
arguments of `LLM`. A flag beats its environment variable, which beats the default. A boolean variable is `1` or `0`. Times are in
seconds, sizes in the unit of the name.

The model is the command's argument (environment variable `PENSTOCK_MODEL`): a Hugging Face model folder, a hub name (ORG/NAME,
pulled if it is not here yet; HF_HUB_OFFLINE=1 forbids that), or `stories`, the embedded model.

Three more variables: `PENSTOCK_MODELS` (where `penstock pull` keeps models; default `~/.cache/penstock/models`), `PENSTOCK_DEBUG=1`
(tracebacks instead of one-line errors), and for `penstock pull` the hub's own `HF_TOKEN` and `HF_ENDPOINT`.
"""


def configuration_page() -> str:
    """The page as Markdown."""
    parts = [_INTRODUCTION]
    config_class: ConfigClass
    for config_class, title in ((EngineConfig, "Engine"), (ServerConfig, "Server"), (GatewayConfig, "Gateway")):
        fields = {field.name: field for field in dataclasses.fields(config_class)}
        hints = typing.get_type_hints(config_class)
        parts.append(f"## {title}\n")
        for section, names in sections_of(config_class).items():
            parts.append(f"### {section}\n\n| flag | variable | default | meaning |\n|---|---|---|---|")
            parts[-1] += "".join("\n" + _row(fields[name], hints[name]) for name in names) + "\n"
    return "\n".join(parts)


def _row(field: dataclasses.Field[Any], hint: Any) -> str:
    flag = flag_name(field.name)
    # A bar inside a cell of a Markdown table needs an escape.
    values = " \\| ".join(field.metadata["choices"] or ())
    flags = f"`{flag}`, `--no-{flag[2:]}`" if hint is bool else f"`{flag}` {values}"
    default = "" if field.default is None else f"`{_text(field.default)}`"
    return f"| {flags.strip()} | `{environment_variable(field.name)}` | {default} | {field.metadata['help']} |"


def _text(value: object) -> str:
    return (
        "on" if value is True else "off" if value is False else f"{value:g}" if isinstance(value, float) else str(value)
    )


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
