"""`penstock version`."""

from __future__ import annotations

import click

from penstock import __version__
from penstock.cli.options import SettingsCommand


@click.command(cls=SettingsCommand)
def version() -> None:
    """Print the version."""
    click.echo(f"penstock {__version__}")
