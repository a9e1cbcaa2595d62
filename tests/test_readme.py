"""README.md's blocks run as they stand, and its tree and links exist.

`<!-- run -->` before a block executes it; `<!-- run: server -->` does so while `penstock serve` runs. Port 8000 is replaced by a
free one. Other blocks are checked for commands and flags that do not exist.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from penstock.cli.app import COMMANDS, cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:<!-- run(?P<server>: server)? -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
START_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    runnable: bool
    needs_server: bool


BLOCKS = [
    Block(match["language"], match["text"], match[0].startswith("<!-- run"), match["server"] is not None)
    for match in BLOCK.finditer(README)
]
RUNNABLE = [block for block in BLOCKS if block.runnable]


def environment() -> dict[str, str]:
    """The virtual environment's programs first; engines small, with one thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    small = {"OMP_NUM_THREADS": "1", "PENSTOCK_THREADS": "1", "PENSTOCK_KV_CACHE_GIB": "0.05"}
    return {**os.environ, "PATH": path, "NO_PROXY": "localhost,127.0.0.1", **small}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a running `penstock serve` of the embedded model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("readme") / "serve.log"
    command = [sys.executable, "-m", "penstock.cli.main", "serve", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment())
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_ready(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()
            process.wait(30)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def run_block(block: Block, port: int | None, folder: Path) -> str:
    text = block.text if port is None else block.text.replace("localhost:8000", f"localhost:{port}")
    python, shell = [sys.executable, "-W", "error", "-c", text], ["bash", "-euo", "pipefail", "-c", text]
    result = subprocess.run(
        python if block.language == "python" else shell,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_readme_has_blocks_of_every_kind_to_run() -> None:
    kinds = {(block.language, block.needs_server) for block in RUNNABLE}
    assert kinds == {("python", True), ("python", False), ("shell", True)}


@pytest.mark.parametrize("block", [b for b in RUNNABLE if b.needs_server], ids=lambda b: b.text.split("\n")[0][:40])
def test_block_with_a_server(block: Block, port: int, tmp_path: Path) -> None:
    if "curl" in block.text and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    output = run_block(block, port, tmp_path)
    assert len(output) > 100


@pytest.mark.parametrize("block", [b for b in RUNNABLE if not b.needs_server], ids=lambda b: b.text.split("\n")[0][:40])
def test_block_without_a_server(block: Block, tmp_path: Path) -> None:
    assert "'Once upon a time' → '" in run_block(block, None, tmp_path)


def test_the_two_commands_come_first() -> None:
    lines = BLOCKS[0].text.splitlines()
    assert [line.split("#")[0].strip() for line in lines] == ["make serve", "penstock serve ./TinyLlama-1.1B-Chat"]


def test_commands_and_flags_in_all_blocks_and_tables_exist() -> None:
    code = "\n".join(block.text for block in BLOCKS)
    used = re.findall(r"(?:^|\| )penstock ([a-z]+)([^|#\n]*)", code, re.MULTILINE)
    used += re.findall(r"`penstock ([a-z]+)([^`]*)`", README)
    assert {name for name, _ in used} >= set(COMMANDS) - {"version"}
    for name, rest in used:
        flags = flags_of(name, rest)
        for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest):
            assert flag in flags, f"penstock {name} has no {flag}"


def flags_of(name: str, rest: str) -> set[str]:
    """The flags of a command, or of the command that a group's next word names."""
    context = click.Context(cli)
    command = cli.get_command(context, name)
    assert command is not None, name
    word = rest.split(maxsplit=1)[0] if rest.strip() else ""
    if isinstance(command, click.Group) and word:
        command = command.get_command(context, word)
        assert command is not None, f"penstock {name} {word}"
    return {flag for parameter in command.params for flag in parameter.opts}


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md"])
def test_links_and_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    package = ROOT / "src" / "penstock"
    for row in re.findall(r"^\| \d+ \| (.+?) \|", text, re.MULTILINE):
        folder = package
        for path in re.findall(r"`([^`]+)`", row):
            # "a/b.py, c.py": the second is beside the first.
            candidates = [package / path, folder / path, folder.parent / path]
            found = next((candidate for candidate in candidates if candidate.exists()), None)
            assert found is not None, path
            folder = found.parent


def test_tree_names_every_room_and_nothing_else() -> None:
    tree = next(block.text for block in BLOCKS if block.text.startswith("src/penstock/"))
    named: set[str] = set()
    parent = ""
    for line in tree.splitlines()[1:]:
        match = re.match(r"( +)([a-z_.]+)(/?) ", line)
        if match is None:
            continue
        indent, name = len(match[1]), match[2]
        parent = name if indent == 2 else parent
        named.add(name if indent == 2 else f"{parent}/{name}")
    package = ROOT / "src" / "penstock"
    rooms = {path.parent.relative_to(package).as_posix() for path in package.glob("*/__init__.py")}
    rooms |= {path.parent.relative_to(package).as_posix() for path in package.glob("[es]*/*/__init__.py")}
    modules = {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    assert named == rooms | modules | {"assets"}
