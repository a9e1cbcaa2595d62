"""The conversation of `penstock chat`: reads lines, shows answers as they stream, keeps the history.

The main thread reads input and gets Ctrl-C; the backend lives on an event loop in a thread of its own, which keeps running
while the user types, so that connections and the engine stay alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import click

from penstock.cli.chat_backends import ChatBackend, Message
from penstock.core.errors import PenstockError

T = TypeVar("T")

HELP = """\
  /reset          forget the conversation (the system message stays)
  /system TEXT    set the system message and start over; without TEXT show it
  /exit           leave (also Ctrl-D)
  Ctrl-C          stop the answer; twice: leave"""


class LoopThread:
    """An event loop in a daemon thread, for the time of a `with` block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat-loop", daemon=True)

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work`; Ctrl-C cancels it."""
        future = self.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


class Conversation:
    """History and commands. `run` returns when the user leaves or the input ends."""

    def __init__(self, loop: LoopThread, backend: ChatBackend, system: str | None) -> None:
        self._loop = loop
        self._backend = backend
        self._system = system
        self._messages: list[Message] = self._opening()
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        try:
            name = self._loop.run(self._backend.start())
            if self._interactive:
                _enable_line_editing()
                click.echo(f"Chatting with {name}. /help lists commands, Ctrl-D leaves.", err=True)
            self._converse()
        finally:
            self._loop.run(self._backend.close())

    def _converse(self) -> None:
        interrupted = False
        while True:
            try:
                line = self._read_line()
                if line is None:
                    return
                if line.startswith("/"):
                    if not self._command(line):
                        return
                elif line:
                    self._answer(line)
                interrupted = False
            except KeyboardInterrupt:
                if interrupted or not self._interactive:
                    raise
                interrupted = True
                click.echo("\nPress Ctrl-C again to leave.", err=True)

    def _read_line(self) -> str | None:
        if self._interactive:
            try:
                return input("> ").strip()
            except EOFError:
                click.echo(err=True)
                return None
        line = sys.stdin.readline()
        return line.strip() if line else None

    def _command(self, line: str) -> bool:
        """Run a /command; False to leave."""
        name, _, argument = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self._messages = self._opening()
            click.echo("The conversation starts over.", err=True)
        elif name == "/system":
            if argument.strip():
                self._system = argument.strip()
                self._messages = self._opening()
            click.echo(f"System message: {self._system or '(none)'}", err=True)
        else:
            if name != "/help":
                click.echo(f"There is no command {name}.", err=True)
            click.echo(HELP, err=True)
        return True

    def _opening(self) -> list[Message]:
        return [{"role": "system", "content": self._system}] if self._system else []

    def _answer(self, question: str) -> None:
        """Stream one answer to stdout. Ctrl-C keeps what came so far; an error takes the question back."""
        messages = [*self._messages, {"role": "user", "content": question}]
        pieces: queue.Queue[str | None] = queue.Queue()
        started = time.monotonic()
        future = self._loop.submit(self._stream(messages, pieces))
        text, first_s = "", 0.0
        try:
            while (piece := pieces.get()) is not None:
                first_s = first_s or time.monotonic() - started
                text += piece
                click.echo(piece, nl=False)
            future.result()
        except KeyboardInterrupt:
            future.cancel()
            click.echo("\n(stopped)", err=True)
        except PenstockError as error:
            click.echo(f"penstock: error: {error}", err=True)
            if not self._interactive:
                raise click.exceptions.Exit(1) from error
            return
        click.echo()
        if self._interactive and text:
            seconds = time.monotonic() - started
            click.secho(f"first text after {first_s:.2f} s, {seconds:.1f} s in all", dim=True, err=True)
        self._messages = [*messages, {"role": "assistant", "content": text}]

    async def _stream(self, messages: list[Message], pieces: queue.Queue[str | None]) -> None:
        """Put the pieces of the answer into the queue, and None at the end, however it ends."""
        try:
            async for piece in self._backend.answer(messages):
                pieces.put(piece)
        finally:
            pieces.put(None)


def _enable_line_editing() -> None:
    """Arrow keys and history in `input`, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
