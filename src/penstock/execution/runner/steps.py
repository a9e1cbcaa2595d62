"""Ways to run steps on the host: in the caller's thread, or one after the other in a thread of their own."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from penstock.core.errors import IntegrityError
from penstock.engine.executor import StepHandle
from penstock.engine.step import RunnerOutput, SchedulerOutput


class Steps(Protocol):
    """What an executor hands its steps to."""

    def submit(self, step: SchedulerOutput) -> StepHandle:
        """See Executor. Raises IntegrityError after `close`."""
        ...

    def close(self) -> None:
        """Wait for the steps in flight, then release model and caches. Idempotent."""
        ...


class StepRunner(Protocol):
    """What runs steps on the host: a ModelRunner, or a stage of a pipeline."""

    def execute(self, step: SchedulerOutput) -> RunnerOutput:
        """See ModelRunner."""
        ...


class FinishedStep:
    """A step that has run: its output, or what it raised."""

    def __init__(self, outcome: RunnerOutput | Exception) -> None:
        self._outcome = outcome

    def done(self) -> bool:
        return True

    def result(self) -> RunnerOutput:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class _SubmittedStep:
    """A step that the worker thread runs or will run."""

    def __init__(self, future: Future[RunnerOutput]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> RunnerOutput:
        return self._future.result()


class HostSteps:
    """Steps of a runner. With `threaded`, one worker thread runs them, and the caller prepares the next one meanwhile."""

    def __init__(self, runner: StepRunner, *, threaded: bool) -> None:
        self._runner: StepRunner | None = runner
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="penstock-runner") if threaded else None

    def submit(self, step: SchedulerOutput) -> StepHandle:
        if self._runner is None:
            raise IntegrityError("a step was submitted to an executor that was shut down")
        if self._worker is not None:
            return _SubmittedStep(self._worker.submit(self._runner.execute, step))
        try:
            return FinishedStep(self._runner.execute(step))
        except Exception as error:
            return FinishedStep(error)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        self._runner = None
