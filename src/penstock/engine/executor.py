"""The protocol between the engine and whatever executes steps: one process, several ranks, a fake for tests, a simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from penstock.core.types import ModelInfo
from penstock.engine.step import RunnerOutput, SchedulerOutput


@dataclass(frozen=True, slots=True)
class KVCapacity:
    """Blocks that the executor allocated. `num_host_blocks` is 0 without a host tier."""

    num_blocks: int
    block_size: int
    bytes_per_block: int
    num_host_blocks: int = 0


class StepHandle(Protocol):
    """One submitted step."""

    def done(self) -> bool:
        """True when `result` returns at once."""
        ...

    def result(self) -> RunnerOutput:
        """Wait for the step. Raises whatever the step raised; the executor stays usable and has forgotten nothing but that step:
        the engine then preempts the step's requests, so that they come again as new ones."""
        ...


class Executor(Protocol):
    """Executes steps in the order of submission, up to `max_inflight` at once."""

    max_inflight: int

    def submit(self, step: SchedulerOutput) -> StepHandle: ...

    def kv_capacity(self) -> KVCapacity: ...

    def model_info(self) -> ModelInfo: ...

    def shutdown(self) -> None:
        """Release memory, threads and processes. Idempotent."""
        ...
