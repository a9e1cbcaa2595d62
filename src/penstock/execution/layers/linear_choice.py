"""Which of several kernels for one weight is faster, measured on the device that will run them.

Times differ between cards and versions of torch, so the question is asked at load, once for each shape: for one token and for 64, as the
two ends of decoding. The kernel with the smaller product of both times is taken, and the figures are logged.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from penstock.execution.layers.linear import LinearKernel

logger = logging.getLogger(__name__)

TIMED_TOKENS = (1, 64)

# Seconds of one call of a kernel with these activations.
Timer = Callable[["LinearKernel", Tensor], float]

# Larger than the second-level cache of current cards.
_FLUSHED_BYTES = 128 * 2**20
_CALLS = 5
_ROUNDS = 5


@dataclass(frozen=True)
class LinearShape:
    """What kernels of one weight form can differ by."""

    out_features: int
    in_features: int
    group_size: int
    dtype: torch.dtype
    device: torch.device


class LinearChoices:
    """Remembers what was found. timer: None takes the first candidate unasked."""

    def __init__(self, timer: Timer | None) -> None:
        self._timer = timer
        self._chosen: dict[LinearShape, str] = {}

    def choose(self, shape: LinearShape, candidates: Mapping[str, Callable[[], LinearKernel]]) -> LinearKernel:
        """The faster of the candidates, which are made to be timed; the first one where none is timed.

        One that raises a RuntimeError is left out with a warning, unless it is the first.
        """
        names = list(candidates)
        if self._timer is None or len(names) == 1:
            return candidates[names[0]]()
        if shape in self._chosen:
            return candidates[self._chosen[shape]]()
        kernels: dict[str, LinearKernel] = {}
        seconds: dict[str, list[float]] = {}
        for name in names:
            try:
                kernel = candidates[name]()
                seconds[name] = [self._timer(kernel, _activations(shape, tokens)) for tokens in TIMED_TOKENS]
                kernels[name] = kernel
            except RuntimeError as error:
                if name == names[0]:
                    raise
                logger.warning("the %s kernel is not used for weights like %s: %s", name, _text(shape), error)
        chosen = min(seconds, key=lambda name: math.prod(seconds[name]))
        self._chosen[shape] = chosen
        figures = ", ".join(
            f"{name} {' / '.join(f'{1e6 * time:.1f}' for time in times)} us" for name, times in seconds.items()
        )
        tokens = " / ".join(str(tokens) for tokens in TIMED_TOKENS)
        logger.info("linear %s: %s for %s tokens; %s is used", _text(shape), figures, tokens, chosen)
        return kernels[chosen]


def cuda_seconds(kernel: LinearKernel, x: Tensor) -> float:
    """Seconds of one call inside a CUDA graph, where no launch is waited for, with nothing of the weight in the second-level cache."""
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=x.device)

    def call() -> None:
        flushed.zero_()
        kernel(x)

    both = _graph_seconds(call)
    return max(both - _graph_seconds(flushed.zero_), 1e-7)


def _graph_seconds(call: Callable[[], object]) -> float:
    """Median seconds of one call of several in a graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    milliseconds: list[float] = []
    for _ in range(_ROUNDS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        milliseconds.append(start.elapsed_time(stop))
    # The first replay uploads the graph.
    return statistics.median(milliseconds[1:]) / 1e3 / _CALLS


def _activations(shape: LinearShape, tokens: int) -> Tensor:
    generator = torch.Generator(shape.device).manual_seed(0)
    return torch.randn(tokens, shape.in_features, generator=generator, device=shape.device).to(shape.dtype)


def _text(shape: LinearShape) -> str:
    return f"{shape.out_features} x {shape.in_features}, groups of {shape.group_size}, {str(shape.dtype).removeprefix('torch.')}"
