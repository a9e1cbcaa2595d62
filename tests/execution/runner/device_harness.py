"""A device runner driven by hand, on an accelerator that punishes impatience."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.engine.executor import StepHandle
from penstock.engine.step import SchedulerOutput
from penstock.execution.attention.context import ForwardContext, forward_context
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.accelerator import HostAccelerator
from penstock.execution.runner.batch import IntArray
from penstock.execution.runner.device_batch import DeviceBatch
from penstock.execution.runner.device_runner import DeviceRunner
from penstock.execution.sampling.device_sampler import DeviceLogprobs, DeviceSampler, DeviceSamples
from penstock.execution.sampling.sampler import Sampler
from tests.execution.runner.harness import BLOCK_SIZE, CPU, MAX_MODEL_LEN, Harness

MAX_TOKENS = 64
# Buffers of StepTensors that hold nothing from one step to the next.
STEP_BUFFERS = (
    "input_ids",
    "positions",
    "slot_mapping",
    "query_start",
    "seq_lens",
    "block_tables",
    "request_slots",
    "logit_rows",
    "sample_slots",
    "sample_positions",
    "sampled",
)


class PoisoningAccelerator(HostAccelerator):
    """Until a copy to the host has arrived there is garbage in its place."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return poison(super().pinned(shape, dtype))

    def fetch(self, source: Tensor, target: Tensor) -> None:
        poison(target)
        super().fetch(source, target)


class LaunchedSampler(Sampler):
    """The sampler of the host behind the interface of the device's."""

    def launch(self, logits: Tensor, slots: IntArray, device_slots: Tensor, positions: Tensor) -> DeviceSamples:
        assert device_slots.tolist() == slots.tolist()
        sampled = self.sample(logits, slots, positions.numpy())
        logprobs = None
        if sampled.logprobs is not None:
            found = sampled.logprobs
            logprobs = DeviceLogprobs(
                sampled.logprob_rows,
                sampled.num_top,
                *(torch.from_numpy(x) for x in (found.logprobs, found.ranks, found.top_ids, found.top_logprobs)),
            )
        return DeviceSamples(torch.from_numpy(sampled.token_ids), torch.from_numpy(sampled.failed), logprobs)


class DeviceHarness(Harness):
    """Buffers of the device are garbage before every step, so that a step that leaves something out is found out."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int = 64,
        num_host_blocks: int = 8,
        max_slots: int = 8,
        max_inflight: int = 2,
        data_size: int = 1 << 10,
        largest_graph: int = 0,
        sampler: type[LaunchedSampler] | type[DeviceSampler] | None = None,
    ) -> None:
        self.sampler_class = sampler or LaunchedSampler
        self.graphs = RecordedDecodes(self, largest_graph) if largest_graph else None
        self.accelerator = PoisoningAccelerator()
        self.buffers = DeviceBatch(
            self.accelerator,
            max_slots=max_slots,
            max_requests=max_slots,
            max_tokens=MAX_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            block_size=BLOCK_SIZE,
            max_inflight=max_inflight,
            data_size=data_size,
        )
        super().__init__(loaded, num_blocks=num_blocks, num_host_blocks=num_host_blocks, max_slots=max_slots)

    def make_runner(self) -> DeviceRunner:
        config = self.loaded.config
        # Padding would be poisoned too.
        make = DeviceRunner if self.graphs is not None else PoisoningRunner
        self.device_runner = make(
            self.model,
            self.kv_caches,
            self.host_caches,
            batch=self.batch,
            buffers=self.buffers,
            sampler=self.sampler_class(config.vocab_size, self.max_slots, CPU, config.eos_token_ids),
            accelerator=self.accelerator,
            graphs=self.graphs,
            max_logits_bytes=self.max_logits_bytes,
        )
        return self.device_runner


class PoisoningRunner(DeviceRunner):
    """Every step finds garbage where its inputs will be."""

    def launch(self, step: SchedulerOutput) -> StepHandle:
        tensors = self._buffers.tensors
        for name in STEP_BUFFERS:
            poison(getattr(tensors, name))
        return super().launch(step)


class RecordedDecodes:
    """Stands for graphs of up to `largest` requests: computes the step from the buffers alone, and looks at the padding behind it."""

    def __init__(self, harness: DeviceHarness, largest: int) -> None:
        self._harness = harness
        self._largest = largest
        self.runs = 0

    def run(self, num_requests: int) -> Tensor | None:
        if num_requests > self._largest:
            return None
        self.runs += 1
        tensors = self._harness.buffers.tensors
        for name, padding in (("seq_lens", 0), ("input_ids", 0), ("positions", 0), ("slot_mapping", -1)):
            assert (getattr(tensors, name)[num_requests : self._harness.max_slots] == padding).all(), name
        metadata = self._harness.buffers.decode_metadata(num_requests, MAX_MODEL_LEN)
        # This backend plans with numbers on the host; a backend for graphs does not need them.
        metadata.seq_lens_host[:] = tensors.seq_lens[:num_requests].numpy()
        with forward_context(ForwardContext(metadata, self._harness.kv_caches)):
            hidden = self._harness.model(tensors.input_ids[:num_requests], tensors.positions[:num_requests])
        return self._harness.model.compute_logits(hidden)


def poison(tensor: Tensor) -> Tensor:
    """Numbers that nothing can take for right."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)
