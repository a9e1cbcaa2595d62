"""Runs cases one after the other within a time, in processes of their own, and stores each result at once.

    ceilings, always first │ group: case, case, case │ group: case … │ report

Cases that were measured on this machine from this commit are skipped with --resume. A case is not begun when less time is left than it is
expected to take, and killed when the time is over; neither leaves a record, so that the next call begins there. One that crashes or
hangs is recorded as failed, and its group goes on in a new process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import msgspec
from benchmarks.gpu.case import Case, Machine, Plan
from benchmarks.gpu.records import Record, Records

if TYPE_CHECKING:
    from penstock.execution.measurement.gpu_card import GPUCeilings

FIRST = "ceilings/card"
# A case that takes this many times as long as expected hangs.
PATIENCE = 6.0
LEAST_PATIENCE_S = 120.0
STOP_S = 20.0
# Starting a process, importing torch and making the first CUDA context.
PROCESS_S = 12.0

Target = Callable[[Connection, Plan, "GPUCeilings | None"], None]
Say = Callable[[Record], None]


class RunError(Exception):
    """Nothing can be measured here."""


@dataclass
class Left:
    """Cases that were not measured, by reason."""

    skipped: list[str] = field(default_factory=list)
    out_of_time: list[str] = field(default_factory=list)


class Driver:
    """One call of the script. `work`: what the processes run (worker.work); `clock`: seconds."""

    def __init__(
        self,
        plan: Plan,
        records: Records,
        commit: str,
        budget_s: float,
        work: Target,
        *,
        say: Say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._records, self._commit, self._work, self._say = plan, records, commit, work, say
        self._clock = clock
        self._end = clock() + budget_s
        self._call = datetime.now(UTC).isoformat(timespec="seconds")
        self._worker: _Worker | None = None
        self._ceilings: GPUCeilings | None = None
        self.machine: Machine | None = None

    def run(self, cases: Sequence[Case], *, resume: bool) -> Left:
        """Measure the card, then every case that fits. Raises RunError when the card cannot be measured."""
        left = Left()
        try:
            machine = self._measure_card(next(case for case in cases if case.key == FIRST))
            known = self._records.done(machine, self._commit) if resume else set()
            wanted = [case for case in cases if case.key != FIRST]
            left.skipped = [case.key for case in wanted if case.key in known]
            for group in by_group(case for case in wanted if case.key not in known):
                self._run_group(group, left)
                self._stop()
        finally:
            self._stop()
        return left

    def _measure_card(self, case: Case) -> Machine:
        from penstock.execution.measurement.gpu_card import GPUCeilings

        kind, content = self._ask(case)
        if kind != "data":
            raise RunError(f"The ceilings could not be measured: {content}")
        self._stop()
        machine = msgspec.convert(content["machine"], Machine)
        self._ceilings = GPUCeilings(**content["ceilings"])
        self.machine = machine
        self._store(case, content["seconds"], {"data": content})
        return machine

    def _run_group(self, cases: Sequence[Case], left: Left) -> None:
        for case in cases:
            start_s = 0.0 if self._worker else PROCESS_S + case.load_s
            if self._remaining() < case.expected_s + start_s:
                left.out_of_time.append(case.key)
                continue
            started = self._clock()
            kind, content = self._ask(case)
            if kind == "late":
                left.out_of_time.append(case.key)
                continue
            result = {"data": content} if kind == "data" else {"error": content}
            self._store(case, self._clock() - started, result)

    def _ask(self, case: Case) -> tuple[str, Any]:
        """("data" | "error", content) or ("late", …) when this call's time is over."""
        worker = self._worker = self._worker or _Worker(self._work, self._plan, self._ceilings)
        patience = max(LEAST_PATIENCE_S, PATIENCE * (case.expected_s + case.load_s))
        remaining = self._remaining()
        kind, content = worker.ask(case.key, min(patience, remaining))
        if kind == "silent":
            self._kill()
            if remaining <= patience:
                return "late", ""
            return "error", f"no result after {patience:.0f} s"
        if kind in ("dead", "broken"):
            self._kill()
            return "error", content
        return kind, content

    def _store(self, case: Case, seconds: float, result: dict[str, Any]) -> None:
        if self.machine is None:
            raise RunError("The machine is not known yet.")
        record = Record(
            section=case.section,
            case=case.name,
            machine=self.machine,
            commit=self._commit,
            call=self._call,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 2),
            ceilings=None if self._ceilings is None else msgspec.to_builtins(self._ceilings),
            **result,
        )
        self._records.append(record)
        self._say(record)

    def _remaining(self) -> float:
        return self._end - self._clock()

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def _kill(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def by_group(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases with those of one group together, groups in the order in which they first appear."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    return list(groups.values())


class _Worker:
    """A process and the line to it."""

    def __init__(self, work: Target, plan: Plan, ceilings: GPUCeilings | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=work, args=(theirs, plan, ceilings))
        self._process.start()
        theirs.close()

    def ask(self, key: str, timeout_s: float) -> tuple[str, Any]:
        """The answer, ("silent", "") after `timeout_s`, or ("dead", why)."""
        try:
            self._connection.send(key)
            if not self._connection.poll(max(0.0, timeout_s)):
                return "silent", ""
            kind, content = self._connection.recv()
            return kind, content
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(STOP_S)
            return "dead", f"the process ended with code {self._process.exitcode}"

    def stop(self) -> None:
        """Let it clean up, but not for long."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(STOP_S)
        self.kill()

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join(STOP_S)
        self._connection.close()
