"""Timing of short operations on a GPU: recorded once, replayed in turns, medians of rounds.

    flush L2 │ start ─ call 0 ─ call 1 … call n-1 ─ end        one replay of a CUDA graph; seconds = (end - start) / n

Calls rotate over copies of their inputs, so that weights and caches come from memory, as they do in a model whose layers follow each
other, while small activations stay in the L2 cache, as they do there. The graph spares the host's launches; the gap between two
kernels of a graph counts, because a step pays it too. The flush runs before the start mark and hides the launch of the replay. What
cannot be recorded is called between the two marks instead, and marked as eager.

On a CPU (interpreted kernels, or a trial of a script) the same functions read the clock around each call; such figures say nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

GPUArithmetic = Literal["bfloat16", "float16", "float8", "float32"]
# One call; the number says which copy of the inputs to take, 0 … copies - 1.
IndexedRun = Callable[[int], object]

ROUNDS = 15
# Copies together are at least this large: three times the L2 cache of the largest current cards.
COLD_BYTES = 192 * 2**20
MOST_COPIES = 64
FEWEST_CALLS = 8
FLUSH_BYTES = 256 * 2**20
# A replay has fewer calls when they are long: these need no rotation to be cold, nor many to be measured.
MOST_REPLAY_S = 0.02


@dataclass(frozen=True)
class GPUCase:
    """One kernel on one shape and, by name, others that do the same work.

    bytes_moved: read and written by one call, at least. operations: of one call. error: relative distance of the result from that of the
    twin in plain torch; tolerance: the largest that passes.
    """

    kernel: str
    shape: str
    rows: int
    bytes_moved: float
    operations: float
    arithmetic: GPUArithmetic
    copies: int
    run: IndexedRun
    references: Mapping[str, IndexedRun] = field(default_factory=dict)
    error: Callable[[], float] | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class GPUTiming:
    """Seconds of one call in each round, by name ('' is the case itself). eager: those that could not be recorded."""

    seconds: dict[str, list[float]]
    eager: tuple[str, ...]


def copies_for(nbytes: float) -> int:
    """Copies of inputs of `nbytes` that the L2 cache does not hold together, as far as MOST_COPIES go."""
    return max(1, min(MOST_COPIES, math.ceil(COLD_BYTES / max(nbytes, 1))))


def arithmetic_of(dtype: torch.dtype) -> GPUArithmetic:
    """The arithmetic that activations of this type are computed in."""
    names: dict[torch.dtype, GPUArithmetic] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return names.get(dtype, "float32")


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative error of a result that is rounded to this type once or twice, sums in float32."""
    return {torch.bfloat16: 6e-3, torch.float16: 1.5e-3}.get(dtype, 2e-3)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; infinite when `found` has anything that is no number."""
    left, right = found.double(), expected.double()
    if not bool(torch.isfinite(left).all()):
        return math.inf
    return float((left - right).norm() / right.norm().clamp_min(1e-30))


def time_in_turns(
    runs: Mapping[str, IndexedRun], copies: int, device: torch.device, *, rounds: int = ROUNDS
) -> GPUTiming:
    """Time every run once a round, each round in the opposite order of the one before."""
    calls = copies * math.ceil(FEWEST_CALLS / copies) if device.type == "cuda" else 1
    timers = {name: _Timer(run, copies, calls, device) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds):
        names = list(timers) if number % 2 == 0 else list(reversed(timers))
        for name in names:
            seconds[name].append(timers[name].measure())
    return GPUTiming(seconds, tuple(name for name, timer in timers.items() if timer.eager))


def time_case(case: GPUCase, device: torch.device, *, rounds: int = ROUNDS) -> GPUTiming:
    """A case and all that it is compared with."""
    return time_in_turns({"": case.run, **case.references}, case.copies, device, rounds=rounds)


def _device_seconds(function: Callable[[], object]) -> float:
    """From a mark before the work to one behind it."""
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class _Timer:
    """One run, warmed up and recorded where that is possible."""

    _flush: Tensor | None = None

    def __init__(self, run: IndexedRun, copies: int, calls: int, device: torch.device) -> None:
        self._run, self._copies, self._calls, self._device = run, copies, calls, device
        self._graph: torch.cuda.CUDAGraph | None = None
        for copy in range(min(3, copies)):
            run(copy)
        if device.type == "cuda":
            slowest = _device_seconds(lambda: run(0))
            self._calls = max(1, min(calls, math.ceil(MOST_REPLAY_S / slowest)))
            self._graph = self._record()

    @property
    def eager(self) -> bool:
        """Whether host launches are part of what is measured."""
        return self._graph is None

    def measure(self) -> float:
        """Seconds of one call."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            self._all_calls()
            return (time.perf_counter() - started) / self._calls
        self._flush_cache()
        return _device_seconds(self._all_calls if self._graph is None else self._graph.replay) / self._calls

    def _all_calls(self) -> None:
        for call in range(self._calls):
            self._run(call % self._copies)

    def _record(self) -> torch.cuda.CUDAGraph | None:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._all_calls()
        except RuntimeError:
            torch.cuda.synchronize(self._device)
            return None
        graph.replay()
        torch.cuda.synchronize(self._device)
        return graph

    def _flush_cache(self) -> None:
        if _Timer._flush is None:
            _Timer._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self._device)
        _Timer._flush.zero_()
