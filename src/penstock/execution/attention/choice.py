"""`--attention-backend auto` on a GPU: which of the backends that could run does run, and why.

Ours is always a candidate. The packages that are installed beside it are others, when they support the model's heads and cache type and
can be recorded in CUDA graphs, or graphs are switched off: a decode step that is launched kernel by kernel loses more than a faster
attention gains. With more than one candidate they are timed on the device, over two representative steps of one layer with the model's
own heads and cache type:

    decode     64 requests with 1,024 tokens of context
    prefill    one prompt of 2,048 tokens

A backend costs  decode + prefill / 16:  where requests bring two prompt tokens for each one that they ask for, a step that gives 64 of
them a token has to be paid for with 128 tokens of prompts, a sixteenth of such a prefill. Ours is kept unless another costs 3 % less. Only
the device's time counts, not planning on the host; compiling happens before. Nothing is remembered: it takes about half a second.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.execution.attention.backend import AttentionBackend, KVCacheSpec, backend_class, make_backend

logger = logging.getLogger(__name__)

# See the module's description.
PREFILL_WEIGHT = 1 / 16
MARGIN = 0.03
BUDGET_SECONDS = 0.5
_MAX_ROUNDS = 9


@dataclass(frozen=True)
class Step:
    """`requests` with `context` tokens each, of which `tokens` are this step's."""

    requests: int
    context: int
    tokens: int


DECODE = Step(64, 1024, 1)
PREFILL = Step(1, 2048, 2048)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one layer's attention in each representative step."""

    decode: float
    prefill: float

    @property
    def cost(self) -> float:
        return self.decode + PREFILL_WEIGHT * self.prefill

    def __str__(self) -> str:
        return f"{self.cost * 1e6:.1f} µs (decode {self.decode * 1e6:.1f}, prefill {self.prefill * 1e6:.1f})"


class Stopwatch(Protocol):
    """Runs steps on a device and measures them. Both methods raise whatever the backend raises."""

    def warm_up(self, backend: AttentionBackend, step: Step) -> None:
        """Once, unmeasured: kernels are compiled and plans are made."""
        ...

    def seconds(self, backend: AttentionBackend, step: Step) -> float:
        """What one layer takes on the device."""
        ...


def choose_backend(
    names: Sequence[str],
    device: torch.device,
    spec: KVCacheSpec,
    arithmetic: torch.dtype,
    *,
    num_heads: int | None,
    graphs: bool,
    make_stopwatch: Callable[[AttentionBackend, torch.device, KVCacheSpec, torch.dtype, int], Stopwatch],
) -> AttentionBackend | None:
    """The backend to use of `names`, ours first; None when none can do a cache of `spec` with queries of type `arithmetic`.

    num_heads: query heads; None: unknown, so that nothing is timed and the first is taken. graphs: decode steps are to be recorded in CUDA
    graphs. make_stopwatch: makes what times them all (DeviceStopwatch); its first argument allocates the cache. A backend that fails on the
    way is left out with a warning.
    """
    candidates, refusals = usable(names, spec, arithmetic, graphs=graphs)
    if not candidates:
        logger.info("attention: torch's operators (%s)", "; ".join(refusals) or "there is nothing else for this device")
        return None
    left_out = f"; {'; '.join(refusals)}" if refusals else ""
    if len(candidates) == 1 or num_heads is None:
        logger.info("attention: %s, the only candidate%s", candidates[0].name, left_out)
        return candidates[0]
    try:
        times = compare(candidates, make_stopwatch(candidates[0], device, spec, arithmetic, num_heads))
    except torch.OutOfMemoryError as error:
        logger.warning("attention: %s, because there is no memory to time others: %s", candidates[0].name, error)
        return candidates[0]
    chosen = fastest(candidates, times)
    figures = ", ".join(f"{name} {step_times}" for name, step_times in times.items())
    logger.info(
        "attention: %s; a layer's decode + prefill / 16: %s%s", chosen.name, figures or "not measured", left_out
    )
    return chosen


def usable(
    names: Sequence[str], spec: KVCacheSpec, arithmetic: torch.dtype, *, graphs: bool
) -> tuple[list[AttentionBackend], list[str]]:
    """Backends that can do it, in the order of `names`, and why the others cannot. A package that fails to import is left out with a
    warning."""
    candidates, refusals = [], []
    for name in names:
        try:
            if graphs and name != names[0] and not backend_class(name).supports_graphs:
                refusals.append(f"{name} cannot be recorded in CUDA graphs (--enforce-eager)")
                continue
            backend = make_backend(name)
            reason = backend.unsupported(spec, arithmetic)
        except Exception as error:  # whatever a package raises while it is imported, serving goes on without it
            if name == names[0]:
                raise
            _warn(name, error)
            continue
        if reason is None:
            candidates.append(backend)
        else:
            refusals.append(f"{name}: {reason}")
    return candidates, refusals


def compare(
    candidates: Sequence[AttentionBackend],
    stopwatch: Stopwatch,
    *,
    clock: Callable[[], float] = time.monotonic,
    budget_seconds: float = BUDGET_SECONDS,
) -> dict[str, StepTimes]:
    """Medians over interleaved rounds, as many as fit into the budget and at least one. A backend that fails is left out with a warning."""
    steps = (DECODE, PREFILL)
    samples: dict[str, list[StepTimes]] = {}
    for backend in candidates:
        try:
            for step in steps:
                stopwatch.warm_up(backend, step)
            samples[backend.name] = []
        except Exception as error:  # a backend that does not work here must not keep the server from starting
            _warn(backend.name, error)
    end = clock() + budget_seconds
    for _ in range(_MAX_ROUNDS):
        for backend in candidates:
            if backend.name not in samples:
                continue
            try:
                samples[backend.name].append(StepTimes(*(stopwatch.seconds(backend, step) for step in steps)))
            except Exception as error:
                _warn(backend.name, error)
                del samples[backend.name]
        if clock() >= end:
            break
    return {
        name: StepTimes(
            statistics.median(times.decode for times in rounds), statistics.median(times.prefill for times in rounds)
        )
        for name, rounds in samples.items()
    }


def fastest(candidates: Sequence[AttentionBackend], times: Mapping[str, StepTimes]) -> AttentionBackend:
    """The cheapest of those that were timed; the first candidate as long as no other is cheaper by more than the margin."""
    timed = [backend for backend in candidates if backend.name in times]
    if not timed:
        return candidates[0]
    best = min(timed, key=lambda backend: times[backend.name].cost)
    ours = candidates[0]
    if ours.name in times and times[best.name].cost >= (1 - MARGIN) * times[ours.name].cost:
        return ours
    return best


def _warn(name: str, error: Exception) -> None:
    logger.warning("attention: %s is not used: %s: %s", name, type(error).__name__, error)
