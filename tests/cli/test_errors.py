"""Whatever goes wrong on the command line is one line that says what to do."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from typing import NoReturn

import pytest

from penstock.cli import checks
from penstock.cli.app import COMMANDS
from penstock.cli.main import INTERRUPTED
from penstock.core.errors import ModelFormatError
from tests.cli.conftest import Invoke


def one_line(text: str) -> str:
    assert text.startswith("penstock: error: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["srve"], "No such command 'srve'. Did you mean 'serve'?"),
        (["serve", "--prt", "1"], "No such option '--prt'. Did you mean '--port'?"),
        (["serve", "--port", "http"], "Invalid value for '--port': 'http' is not a valid integer."),
        (["serve", "--port", "70000"], "--port must be between 0 and 65535, not 70000."),
        (["serve", "--dtype", "int8"], "'int8' is not one of 'auto', 'float32', 'bfloat16', 'float16'."),
        (["serve", "a", "b"], "unexpected extra argument"),
        (["serve", "./nowhere"], "There is no folder ./nowhere."),
        (["serve", "org/model"], "Run `penstock pull org/model` first"),
        (["chat", "--url", "localhost:8000"], "such as http://localhost:8000"),
        (["chat", "./nowhere"], "There is no folder ./nowhere."),
        (["generate", "./nowhere"], "There is no folder ./nowhere."),
        (["generate", "--temperature", "9"], "temperature must be at least 0.0 and at most 2.0, not 9.0."),
        (["pull", "../etc"], "is not a hub name"),
        (["pull"], "Missing argument 'NAME'"),
    ],
)
def test_wrong_command_lines(invoke: Invoke, arguments: list[str], expected: str) -> None:
    result = invoke(*arguments)
    assert result.code in (1, 2)
    assert result.out == ""
    assert expected in one_line(result.err)


def test_wrong_environment_variable_is_named(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_PORT", "http")
    assert "environment variable PENSTOCK_PORT" in one_line(invoke("serve").err)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (ModelFormatError("x/config.json has no model_type."), 1, "x/config.json has no model_type."),
        (MemoryError(), 1, "Not enough memory. Lower --kv-cache-gib"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "Not enough memory."),
        (OSError(errno.EADDRINUSE, "Address already in use"), 1, "choose another with --port"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 1, "/root/x: Permission denied."),
        (ModuleNotFoundError("No module named 'fastapi'", name="fastapi"), 1, "pip install 'penstock[server]'"),
        (ZeroDivisionError("division by zero\nsecond line"), 1, "Unexpected ZeroDivisionError: division by zero."),
        (KeyboardInterrupt(), INTERRUPTED, ""),
    ],
)
def test_failures_inside_a_command(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str
) -> None:
    def fail() -> NoReturn:
        raise error

    monkeypatch.setattr(checks, "run_checks", fail)
    result = invoke("doctor")
    assert result.code == code
    assert expected in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_debug_shows_the_traceback(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def fail() -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr(checks, "run_checks", fail)
    if how == "variable":
        monkeypatch.setenv("PENSTOCK_DEBUG", "1")
    result = invoke("doctor", *(["--debug"] if how == "flag" else []))
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert "ZeroDivisionError" in result.err


def test_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m penstock.cli.main serve --help | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith("Usage: penstock serve")
    assert result.stderr == ""


def test_interrupt_shows_no_traceback(model_folder: str) -> None:
    """Ctrl-C while the command waits for its input."""
    command = [sys.executable, "-m", "penstock.cli.main", "generate", model_folder]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The command reads stdin to its end; by the time it blocks there, the interpreter's own start-up is over.
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert err.strip() == ""


def test_every_command_has_help_that_names_its_settings(invoke: Invoke) -> None:
    overview = invoke("--help")
    assert overview.code == 0
    for name, (_, summary) in COMMANDS.items():
        assert name in overview.out
        assert summary in overview.out
        page = invoke(name, "--help")
        assert page.code == 0
        assert page.out.startswith(f"Usage: penstock {name}")


def test_help_groups_settings_and_shows_defaults(invoke: Invoke) -> None:
    page = invoke("serve", "--help").out
    for section in ("Model:", "Memory:", "Scheduling:", "HTTP server:", "Streaming:", "Log:", "Supervision:"):
        assert f"\n{section}\n" in page
    assert "--prefix-caching / --no-prefix-caching" in page
    assert "[default: 127.0.0.1]" in page


def test_signal_number_is_the_shell_convention() -> None:
    assert INTERRUPTED == 128 + signal.SIGINT


def test_without_a_command_the_help_is_shown(invoke: Invoke) -> None:
    result = invoke()
    assert result.code == 2
    assert "Commands:\n" in result.err
