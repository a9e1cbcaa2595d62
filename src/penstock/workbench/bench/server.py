"""A server process to measure: started on a free port, watched until it is ready, stopped in the end."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from penstock.workbench.bench.load import BenchmarkError

POLL_S = 0.02
STOP_TIMEOUT_S = 40.0


def penstock_command(*arguments: str) -> list[str]:
    """The command line of `penstock` in this interpreter."""
    return [sys.executable, "-m", "penstock.cli.main", *arguments]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A server under a command line to which `--port N` is added. A context manager: entering starts it and waits until
    `GET ready_path` answers 200, leaving stops it with SIGTERM and, if that does not help, SIGKILL.

    `url` is its address, `ready_s` the seconds from exec to the first 200. Raises BenchmarkError with the end of its output when it exits
    early or is not ready within `timeout_s`.
    """

    def __init__(self, command: Sequence[str], *, timeout_s: float = 300.0, ready_path: str = "/health/ready") -> None:
        self._port = free_port()
        self._command = [*command, "--port", str(self._port)]
        self._timeout_s = timeout_s
        self._ready_path = ready_path
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _stop
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"
        self.ready_s = 0.0

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BenchmarkError("The server was not started.")
        return self._process.pid

    def __enter__(self) -> ServerProcess:
        started = time.perf_counter()
        self._process = subprocess.Popen(self._command, stdout=self._output, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            while not self._ready():
                if self._process.poll() is not None:
                    raise BenchmarkError(f"The server exited with {self._process.returncode}. {self._tail()}")
                if time.perf_counter() - started > self._timeout_s:
                    raise BenchmarkError(f"The server was not ready within {self._timeout_s:.0f} s. {self._tail()}")
                time.sleep(POLL_S)
        except BaseException:
            self._stop()
            raise
        self.ready_s = time.perf_counter() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5.0)
        try:
            connection.request("GET", self._ready_path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _stop(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._output.close()

    def _tail(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").strip().splitlines()
        return " | ".join(lines[-5:]) or "It printed nothing."
