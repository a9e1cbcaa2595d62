"""A real server in its own process, for tests that drive it over HTTP as a user would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil


class ServerFailedError(Exception):
    """The server ended or did not become ready; the message has the end of its log."""


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RunningServer:
    """`penstock serve MODEL --port … [flags]`, ready when entered, ended when left. `log`: the file with everything it printed."""

    def __init__(self, model: str, *flags: str, log: Path, timeout_s: float = 60.0) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._timeout_s = timeout_s
        self._command = [sys.executable, "-m", "penstock.cli.main", "serve", model, "--port", str(self.port), *flags]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RunningServer:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603  our own command
                self._command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        try:
            self.wait_ready(self._timeout_s)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerFailedError("the server was not started")
        return self._process

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET; status 0 when nothing answers."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:  # noqa: S310  loopback
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Raises ServerFailedError when it ends first or takes too long."""
        deadline = time.monotonic() + timeout_s
        while self.get("/health/ready")[0] != 200:
            if self.process.poll() is not None:
                raise ServerFailedError(f"exit status {self.process.returncode}\n{self.log.read_text()[-4000:]}")
            if time.monotonic() > deadline:
                raise ServerFailedError(f"not ready after {timeout_s} s\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def engine_pids(self) -> list[int]:
        """The engine processes of this server."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in children if "penstock.launch" in _command_line(child)]

    def signal_engine(self, number: signal.Signals) -> None:
        for pid in self.engine_pids():
            os.kill(pid, number)

    def resident_bytes(self) -> int:
        """Memory of the server and all its children."""
        main = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [main, *main.children(recursive=True)])

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample in /metrics, 0 when it is absent. Sums over labels that are not given."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{k}="{v}"' in sample for k, v in labels.items()):
                total += float(value)
        return total

    def interrupt(self, timeout_s: float = 40.0) -> int:
        """Ctrl-C, and the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """Stop the server however it takes. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _command_line(process: psutil.Process) -> Sequence[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
