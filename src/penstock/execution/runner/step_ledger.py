"""Which steps are in flight on several ranks, and what the ranks have said of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from penstock.core.errors import IntegrityError
from penstock.engine.step import RequestKey, RunnerOutput
from penstock.execution.runner.rank_messages import Failed

# When some ranks of a stage have failed, the others have too, or they wait for those in an operation that never ends.
PARTIAL_FAILURE_S = 5.0


class StepFailedError(Exception):
    """A step failed on all ranks of a stage alike, and they have left it behind them."""


@dataclass
class _Open:
    """A step in flight: what comes of it, and who has failed at it."""

    future: Future[RunnerOutput]
    output: RunnerOutput | None = None
    failures: dict[int, Failed] = field(default_factory=dict)
    failing_since: float = 0.0


class StepLedger:
    """tensor_size ranks of each of `num_stages` stages execute every step; the first rank of the last stage answers for it.

    A step that all ranks of a stage failed at is over when the last stage is done with it: it raises, and the others go on. When only some
    ranks of a stage failed, the rest hang: see `stuck`. Thread-safe: steps are opened by one thread, and answered by another.
    """

    def __init__(self, tensor_size: int, num_stages: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tensor_size = tensor_size
        self._num_stages = num_stages
        self._output_rank = tensor_size * (num_stages - 1)
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._next_number = 0
        self._reason: str | None = None
        self._news: dict[RequestKey, list[int]] = {}

    @property
    def output_rank(self) -> int:
        """Who answers for steps."""
        return self._output_rank

    def open(self) -> tuple[int, Future[RunnerOutput], dict[RequestKey, list[int]]]:
        """A step is submitted: its number, what will come of it, and the tokens that stages before the last have to be told of. Raises
        IntegrityError after `close`."""
        with self._lock:
            if self._reason is not None:
                raise IntegrityError(self._reason)
            number = self._next_number
            self._next_number += 1
            future: Future[RunnerOutput] = Future()
            self._open[number] = _Open(future)
            news, self._news = self._news, {}
            return number, future, news

    def finished(self, number: int, output: RunnerOutput) -> None:
        """The rank that answers has executed a step. Raises IntegrityError for one that is not in flight."""
        with self._lock:
            step = self._find(number)
            step.output = output
            if not step.failures:
                if self._num_stages > 1:
                    self._news.update(output.sampled_token_ids)
                del self._open[number]
                step.future.set_result(output)
            else:
                self._settle(number, step)

    def failed(self, rank: int, failure: Failed) -> None:
        """A rank has failed at a step. Raises IntegrityError when that step is over: its outcome cannot be taken back."""
        with self._lock:
            step = self._find(failure.number, failure.message)
            if not step.failures:
                step.failing_since = self._clock()
            step.failures[rank] = failure
            self._settle(failure.number, step)

    def stuck(self) -> str | None:
        """Why the ranks will never get any further, once that is certain: some of a stage have failed at a step, its others have not."""
        with self._lock:
            for step in self._open.values():
                late = self._clock() - step.failing_since > PARTIAL_FAILURE_S
                if step.failures and late and not self._alike(step):
                    rank, failure = next(iter(step.failures.items()))
                    return f"rank {rank} failed at a step and others did not: {failure.message}"
        return None

    def close(self, reason: str) -> None:
        """No step in flight will be answered, and none can be opened: all raise IntegrityError with `reason`. The first reason stays."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            steps, self._open = list(self._open.values()), {}
        for step in steps:
            step.future.set_exception(IntegrityError(reason))

    def _find(self, number: int, why: str = "it answered twice") -> _Open:
        if number not in self._open:
            raise IntegrityError(f"a rank spoke of step {number}, which is over: {why}")
        return self._open[number]

    def _alike(self, step: _Open) -> bool:
        """Whether every stage in which a rank failed has failed as a whole."""
        size = self._tensor_size
        stages = {rank // size for rank in step.failures}
        return all(rank in step.failures for stage in stages for rank in range(stage * size, (stage + 1) * size))

    def _settle(self, number: int, step: _Open) -> None:
        """Raise in the step's handle once every stage that failed has failed as a whole and the rank that answers is done."""
        if not self._alike(step) or (step.output is None and self._output_rank not in step.failures):
            return
        del self._open[number]
        first = step.failures[min(step.failures)]
        error = IntegrityError if any(failure.fatal for failure in step.failures.values()) else StepFailedError
        step.future.set_exception(error(first.message))
