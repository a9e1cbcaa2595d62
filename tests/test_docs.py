"""The pages of docs/ that show commands: their `<!-- run -->` blocks are executed in order, as one script per page.

Port 8000 is replaced by a free one; accounts live in a database of the test's own. Flags and links that a page names exist.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from penstock.cli.app import COMMANDS, cli
from penstock.testing.server import free_port

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("security.md", "limits.md")
RUN = re.compile(r"<!-- run -->\n```shell\n(.*?)```", re.DOTALL)


def script_of(page: str, port: int) -> str:
    blocks = RUN.findall((DOCS / page).read_text())
    assert blocks, f"{page} runs nothing"
    text = "".join(blocks).replace("localhost:8000", f"127.0.0.1:{port}").replace("--port 8000", f"--port {port}")
    return "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n" + text


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_work_as_they_stand(page: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PENSTOCK_DATABASE_URL": f"sqlite:///{tmp_path}/accounts.db",
        "PENSTOCK_KV_CACHE_GIB": "0.05",
        "PENSTOCK_THREADS": "1",
        "NO_PROXY": "localhost,127.0.0.1",
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script_of(page, free_port())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    log = tmp_path / "serve.log"
    assert result.returncode == 0, result.stdout + result.stderr + (log.read_text() if log.exists() else "")


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md") if path.name != "LOG.md"))
def test_flags_that_a_page_names_exist(page: str) -> None:
    text = (DOCS / page).read_text()
    known = set()
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        known |= flags_of(command)
    for flag in re.findall(r"`(--[a-z][a-z0-9-]*)[ `=]", text):
        assert flag in known, f"{page} names {flag}"


def flags_of(command: click.Command) -> set[str]:
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(command, click.Group):
        for sub in command.commands.values():
            flags |= flags_of(sub)
    return flags
