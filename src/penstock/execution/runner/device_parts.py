"""What the runner of an accelerator needs of recorded steps and of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from penstock.execution.runner.batch import IntArray
from penstock.execution.runner.model_runner import SlotSampler
from penstock.execution.sampling.device_sampler import DeviceSamples
from penstock.execution.sampling.masks import TokenMasks


class Graphs(Protocol):
    """Recorded steps; see step_graphs.StepGraphs."""

    def query_len(self, num_requests: int, longest: int) -> int:
        """How many rows each request has in the recorded step for so many requests of up to `longest` tokens; 0 when there is none."""
        ...

    def run(self, num_requests: int, query_len: int) -> Tensor:
        """Logits [num_requests * query_len, V] of the step that lies in the buffers, a view that the next run overwrites."""
        ...


class LaunchingSampler(SlotSampler, Protocol):
    """See sampling.device_sampler.DeviceSampler."""

    @property
    def vocab_size(self) -> int: ...

    def launch(
        self,
        logits: Tensor,
        slots: IntArray,
        device_slots: Tensor,
        positions: Tensor,
        masks: TokenMasks | None = None,
    ) -> DeviceSamples: ...

    def launch_verify(
        self,
        logits: Tensor,
        slots: IntArray,
        device_slots: Tensor,
        positions: Tensor,
        drafts: Sequence[Sequence[int]],
        masks: TokenMasks | None = None,
    ) -> DeviceSamples: ...
