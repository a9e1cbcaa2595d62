"""A case: one measurement that is made, stored and, after an interruption, made again as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

if TYPE_CHECKING:
    import torch

    from penstock.execution.measurement.gpu_card import GPUCeilings

Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """What a run is asked for, the same in every process of it. tiny: a trial of the script on a CPU, whose figures mean nothing."""

    device: str
    tiny: bool
    rounds: int

    def torch_device(self) -> torch.device:
        import torch

        return torch.device(self.device)


@dataclass
class Context:
    """What a case finds in the process that measures it. kept: what one case leaves for the next one of its group, by name."""

    plan: Plan
    ceilings: GPUCeilings | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def card(self) -> GPUCeilings:
        """The ceilings that this run measured first. Raises RuntimeError before that."""
        if self.ceilings is None:
            raise RuntimeError("the ceilings have not been measured")
        return self.ceilings


@dataclass(frozen=True)
class Case:
    """group: cases of one group share a process. expected_s: about how long it takes, compiling included; load_s: what comes on top of that
    for the first case of a group in a process. A case is not begun when less is left of the run's time."""

    section: str
    name: str
    group: str
    expected_s: float
    measure: Callable[[Context], dict[str, Any]]
    load_s: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.section}/{self.name}"


# What stands for the GPU's name in a trial.
NO_GPU = "cpu smoke"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured on. Figures of different kinds of machines are never put into one table."""

    gpu: str
    driver: str
    cuda: str
    memory_gib: float
    multiprocessors: int
    cpu: str
    cores: int
    python: str
    versions: dict[str, str]

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be equal for figures to stand in one table: the GPU and the software that runs on it. The rest is reported."""
        return self.gpu, self.memory_gib, self.multiprocessors, self.cuda, tuple(sorted(self.versions.items()))

    @property
    def slug(self) -> str:
        """For file names."""
        return "-".join(self.gpu.lower().split())


def repeat(measure: Callable[[int], Result], rounds: int, budget_s: float) -> list[Result]:
    """`measure(round)` for `rounds` times, or as often as `budget_s` allows, at least once."""
    results: list[Result] = []
    started = time.perf_counter()
    while len(results) < rounds:
        results.append(measure(len(results)))
        if (time.perf_counter() - started) * (len(results) + 1) / len(results) > budget_s:
            break
    return results
