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


@dataclass(frozen=True, slots=True)
class SpeculationProfile:
    """What the executor can propose: most draft tokens for one request and step. adaptive: how many is the scheduler's to choose; otherwise
    always that many."""

    max_draft_tokens: int
    adaptive: bool = False


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
    """Executes steps in the order of submission, up to `max_inflight` at once.

    micro_batches: stages of a pipeline, each of which works on another step; above 1 a step cannot start from a token that a step in flight
    samples, so that the requests have to be divided over as many steps; then no request is in two steps in flight, and never are more
    steps than micro_batches in flight. speculation: None when there are no proposals.
    """

    max_inflight: int
    micro_batches: int
    speculation: SpeculationProfile | None

    def submit(self, step: SchedulerOutput) -> StepHandle: ...

    def kv_capacity(self) -> KVCapacity: ...

    def model_info(self) -> ModelInfo: ...

    def shutdown(self) -> None:
        """Release memory, threads and processes. Idempotent."""
        ...
