"""`penstock chat` over a pipe and over a terminal, with a real gateway and with an engine in the process."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from penstock.core.errors import EngineError
from penstock.serving.frontend.client import ChatPrompt
from penstock.testing.fake_client import Behavior, FakeClient
from tests.cli.conftest import Invoke, RunningServer


def messages_of(client: FakeClient, index: int) -> list[tuple[str, str]]:
    prompt = client.requests[index].prompt
    assert isinstance(prompt, ChatPrompt)
    return [(message["role"], message["content"]) for message in prompt.messages]


def test_conversation_with_a_server(invoke: Invoke, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client.behavior = Behavior(reply="Good day.")
    lines = "hello\n/system Be brief.\nagain\nmore\n/reset\nfresh\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    result = invoke("chat", "--url", server.url, "--temperature", "0", "--max-tokens", "50", "--stop", "###")
    assert result.code == 0
    assert result.out == "Good day.\n" * 4
    assert messages_of(server.client, 0) == [("user", "hello")]
    assert messages_of(server.client, 1) == [("system", "Be brief."), ("user", "again")]
    assert messages_of(server.client, 2) == [
        ("system", "Be brief."),
        ("user", "again"),
        ("assistant", "Good day."),
        ("user", "more"),
    ]
    assert messages_of(server.client, 3) == [("system", "Be brief."), ("user", "fresh")]
    assert len(server.client.requests) == 4
    sampling = server.client.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0.0, 50, ("###",))


def test_model_in_this_process(
    invoke: Invoke, engine: FakeClient, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.behavior = Behavior(reply="Héllo 🐢")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    result = invoke("chat", model_folder, "--system", "S")
    assert (result.code, result.out) == (0, "Héllo 🐢\n")
    assert messages_of(engine, 0) == [("system", "S"), ("user", "hi")]


def test_wrong_model_name_lists_what_the_server_has(invoke: Invoke, server: RunningServer) -> None:
    result = invoke("chat", "other", "--url", server.url)
    assert result.code == 1
    assert "serves no model 'other'; it has fake." in result.err


def test_no_server(invoke: Invoke) -> None:
    result = invoke("chat", "--url", "http://127.0.0.1:9")
    assert result.code == 1
    assert "Cannot reach http://127.0.0.1:9" in result.err
    assert result.err.count("\n") == 1


def test_error_in_the_middle_of_an_answer(
    invoke: Invoke, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.client.behavior = Behavior(error=EngineError("This request failed."), error_after=3)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    result = invoke("chat", "--url", server.url)
    assert result.code == 1
    assert "This request failed." in result.err
    assert "Traceback" not in result.err


class Terminal:
    """`penstock chat` on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._fd, child = pty.openpty()
        command = [sys.executable, "-m", "penstock.cli.main", "chat", *arguments]
        # A session of its own with the terminal as its controlling one, so that Ctrl-C arrives as in a shell.
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(child)
        self.seen = ""

    def wait_for(self, text: str, timeout_s: float = 30.0) -> None:
        """Read until `text` shows; what was read before is forgotten."""
        assert self.shows(text, timeout_s), f"waited for {text!r}, saw {self.seen!r}"

    def shows(self, text: str, timeout_s: float) -> bool:
        """The same; False when it does not show in time."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            if time.monotonic() > deadline:
                return False
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._fd, 65536).decode(errors="replace")
                except OSError as error:  # the other end is closed
                    raise AssertionError(f"ended before {text!r}, saw {self.seen!r}") from error
        self.seen = self.seen.partition(text)[2]
        return True

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C, again when nothing happens: one that comes just before `input` waits is noticed only with the next key."""
        for _ in range(10):
            self.interrupt()
            if self.shows(text, 2.0):
                return
        raise AssertionError(f"no interrupt brought {text!r}, saw {self.seen!r}")

    def interrupt_to_the_end(self) -> None:
        """Ctrl-C until the process ends; again for the same reason."""
        for _ in range(10):
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
                return

    def close(self) -> int:
        code = self.process.wait(30)
        os.close(self._fd)
        return code


def test_interrupt_stops_the_answer_and_twice_leaves(server: RunningServer) -> None:
    server.client.behavior = Behavior(interval_s=0.02)
    terminal = Terminal("--url", server.url)
    terminal.wait_for("Chatting with fake.")
    terminal.wait_for("> ")
    terminal.type("endless\n")
    terminal.wait_for("endless")
    terminal.wait_for("<user>endless")
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    deadline = time.monotonic() + 10
    while not server.client.closed_early:
        assert time.monotonic() < deadline, "the server still generates"
        time.sleep(0.01)
    terminal.type("/help\n")
    terminal.wait_for("/reset")
    terminal.wait_for("> ")
    terminal.interrupt_until("Press Ctrl-C again to leave.")
    terminal.interrupt_to_the_end()
    assert terminal.close() == 130
    assert "Traceback" not in terminal.seen


def test_end_of_input_on_a_terminal_leaves(server: RunningServer) -> None:
    terminal = Terminal("--url", server.url)
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.close() == 0
