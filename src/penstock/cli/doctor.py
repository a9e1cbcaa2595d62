"""`penstock doctor`: what this machine has, what is missing and how to get it."""

from __future__ import annotations

import json

import click

from penstock.cli.options import SettingsCommand

MARKS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}
COLORS = {"ok": "green", "note": "yellow", "fail": "red"}


@click.command(cls=SettingsCommand)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of a table.")
def doctor(as_json: bool) -> int:
    """Say what this machine has, what is missing and how to get it.

    The exit code is 0 when `penstock serve` can work here, else 1.
    """
    from penstock.cli.checks import run_checks

    checks = run_checks()
    can_serve = all(check.status != "fail" for check in checks)
    if as_json:
        report = {"can_serve": can_serve, "checks": [check.as_dict() for check in checks]}
        click.echo(json.dumps(report, indent=2))
        return 0 if can_serve else 1
    for check in checks:
        click.echo(f"{click.style(MARKS[check.status], fg=COLORS[check.status])}  {check.name:<18} {check.value}")
        if check.fix:
            click.echo(f"{'':6}{'':18} → {check.fix}")
    click.echo()
    click.echo("penstock serve can work here." if can_serve else "penstock serve cannot work here yet; see FAIL above.")
    return 0 if can_serve else 1
