"""An engine in a process of its own that answers one command at a time, and what the system says of that process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import psutil

from penstock.workbench.bench.load import BenchmarkError

ANSWER_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0


class Worker:
    """Runs an adapter. A context manager that ends it. Raises BenchmarkError when the engine says no, dies or does not answer."""

    def __init__(self, python: Path, script: Path, environment: dict[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._stderr: IO[bytes] = log.open("wb")
        # Compiled Python files make the second start what it is for a user.
        settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [str(python), str(script)],
            env=settings | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._commands = cast("IO[bytes]", self._process.stdin)
        self._answers = cast("IO[bytes]", self._process.stdout)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        try:
            self._commands.write(json.dumps({"do": do, **values}).encode() + b"\n")
            self._commands.flush()
        except OSError as error:
            raise BenchmarkError(f"has ended: {self._tail()}") from error
        if not select.select([self._answers], [], [], ANSWER_TIMEOUT_S)[0]:
            raise BenchmarkError(f"did not answer within {ANSWER_TIMEOUT_S:.0f} s")
        line = self._answers.readline()
        if not line:
            raise BenchmarkError(f"has ended: {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(answer["error"])
        return answer

    def cpu_seconds(self) -> float:
        """CPU seconds of the process and its children so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._family())

    def reset_peak(self) -> None:
        """Let the peak of resident memory start at what is resident now (Linux: proc_pid_clear_refs(5))."""
        for process in self._family():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Peak resident memory since reset_peak, of the process and its children."""
        return sum(_status_kib(process.pid, "VmHWM") for process in self._family()) * 1024

    def stop(self) -> None:
        """Ask it to quit, and end it when it does not."""
        if self._process.poll() is None:
            try:
                self.ask("quit")
                self._process.wait(STOP_TIMEOUT_S)
            except (BenchmarkError, subprocess.TimeoutExpired):
                for process in self._family():
                    process.kill()
                self._process.wait()
        for pipe in (self._commands, self._answers, self._stderr):
            # What a dead process was still to be sent is lost.
            with suppress(BrokenPipeError):
                pipe.close()

    def _family(self) -> list[psutil.Process]:
        own = psutil.Process(self._process.pid)
        return [own, *own.children(recursive=True)]

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[:400] or "it printed nothing"


def _status_kib(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise BenchmarkError(f"/proc/{pid}/status has no {name}")
