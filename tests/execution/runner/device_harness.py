"""A device runner driven by hand, on an accelerator that punishes impatience."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from penstock.engine.executor import StepHandle
from penstock.engine.step import SchedulerOutput
from penstock.execution.attention.context import ForwardContext, forward_context
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.accelerator import HostAccelerator
from penstock.execution.runner.batch import IntArray
from penstock.execution.runner.device_batch import DeviceBatch
from penstock.execution.runner.device_runner import DeviceRunner
from penstock.execution.sampling.device_sampler import DeviceLogprobs, DeviceSampler, DeviceSamples
from penstock.execution.sampling.masks import TokenMasks
from penstock.execution.sampling.sampler import Sampler
from penstock.execution.sampling.verification import DraftRows
from penstock.execution.speculative.proposer import Proposer
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
    """The sampler of the host behind the interface of the device's. Drafts are verified one row after the other."""

    def launch(
        self,
        logits: Tensor,
        slots: IntArray,
        device_slots: Tensor,
        positions: Tensor,
        masks: TokenMasks | None = None,
    ) -> DeviceSamples:
        assert device_slots.tolist() == slots.tolist()
        sampled = self.sample(logits, slots, positions.numpy(), masks)
        logprobs = None
        if sampled.logprobs is not None:
            found = sampled.logprobs
            logprobs = DeviceLogprobs(
                sampled.logprob_rows,
                sampled.num_top,
                *(torch.from_numpy(x) for x in (found.logprobs, found.ranks, found.top_ids, found.top_logprobs)),
            )
        return DeviceSamples(torch.from_numpy(sampled.token_ids), torch.from_numpy(sampled.failed), logprobs)

    def launch_verify(
        self,
        logits: Tensor,
        slots: IntArray,
        device_slots: Tensor,
        positions: Tensor,
        drafts: Sequence[Sequence[int]],
        masks: TokenMasks | None = None,
    ) -> DeviceSamples:
        rows = DraftRows(drafts)
        assert device_slots.tolist() == slots[rows.request].tolist()
        assert len(logits) == len(positions) == len(device_slots)
        token_ids, failed = torch.zeros(len(logits), dtype=torch.int64), torch.ones(len(logits), dtype=torch.bool)
        found: list[DeviceLogprobs] = []
        for request, first in enumerate(rows.start.tolist()):
            for row in range(first, first + 1 + len(drafts[request])):
                one = slice(row, row + 1)
                sampled = self.launch(
                    logits[one], slots[[request]], device_slots[one], positions[one], _masks_of(masks, row)
                )
                token_ids[row], failed[row] = sampled.token_ids[0], sampled.failed[0]
                if sampled.logprobs is not None:
                    found.append(dataclasses.replace(sampled.logprobs, rows=np.array([row])))
                if token_ids[row] != rows.draft_behind[row]:
                    break
        return DeviceSamples(token_ids, failed, _merged(found) if found else None)


def _masks_of(masks: TokenMasks | None, row: int) -> TokenMasks | None:
    if masks is None or row not in masks.rows:
        return None
    return TokenMasks(np.array([0]), masks.bits[masks.rows == row])


def _merged(found: list[DeviceLogprobs]) -> DeviceLogprobs:
    most = max(some.top_ids.shape[1] for some in found)
    return DeviceLogprobs(
        np.concatenate([some.rows for some in found]),
        [count for some in found for count in some.num_top],
        torch.cat([some.logprobs for some in found]),
        torch.cat([some.ranks for some in found]),
        *(
            torch.cat([functional.pad(top, (0, most - top.shape[1])) for top in tops])
            for tops in ([some.top_ids for some in found], [some.top_logprobs for some in found])
        ),
    )


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
        graph_lengths: Sequence[int] = (1,),
        max_drafts: int = 0,
        make_proposer: Callable[[Harness], Proposer] | None = None,
        sampler: type[LaunchedSampler] | type[DeviceSampler] | None = None,
    ) -> None:
        self.sampler_class = sampler or LaunchedSampler
        self.graphs = RecordedSteps(self, largest_graph, graph_lengths) if largest_graph else None
        # Behind those that requests may have: for what is computed and belongs to nobody.
        self.spare_block = num_blocks
        self.accelerator = PoisoningAccelerator()
        self.buffers = DeviceBatch(
            self.accelerator,
            max_slots=max_slots,
            max_requests=max_slots,
            max_tokens=MAX_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            block_size=BLOCK_SIZE,
            max_inflight=max_inflight,
            max_drafts=max_drafts,
            data_size=data_size,
        )
        super().__init__(
            loaded,
            num_blocks=num_blocks + 1,
            num_host_blocks=num_host_blocks,
            max_slots=max_slots,
            make_proposer=make_proposer,
        )

    def make_sampler(self) -> LaunchedSampler | DeviceSampler:
        config = self.loaded.config
        return self.sampler_class(config.vocab_size, self.max_slots, CPU, config.eos_token_ids)

    def make_runner(self) -> DeviceRunner:
        # Padding would be poisoned too.
        make = DeviceRunner if self.graphs is not None else PoisoningRunner
        self.device_runner = make(
            self.model,
            self.kv_caches,
            self.host_caches,
            batch=self.batch,
            buffers=self.buffers,
            sampler=self.sampler,
            accelerator=self.accelerator,
            graphs=self.graphs,
            max_logits_bytes=self.max_logits_bytes,
            proposer=self.proposer,
        )
        return self.device_runner


class PoisoningRunner(DeviceRunner):
    """Every step finds garbage where its inputs will be."""

    def launch(self, step: SchedulerOutput) -> StepHandle:
        tensors = self._buffers.tensors
        for name in STEP_BUFFERS:
            poison(getattr(tensors, name))
        return super().launch(step)


class RecordedSteps:
    """Stands for graphs of up to `largest` requests with one of `lengths` rows each: computes the step from the buffers alone, and looks at
    the padding behind it and in front of requests with fewer tokens."""

    def __init__(self, harness: DeviceHarness, largest: int, lengths: Sequence[int]) -> None:
        self._harness = harness
        self._largest = largest
        self._lengths = lengths
        self.runs = 0
        self.lengths_run: set[int] = set()

    def query_len(self, num_requests: int, longest: int) -> int:
        if num_requests > self._largest:
            return 0
        return next((length for length in self._lengths if length >= longest), 0)

    def run(self, num_requests: int, query_len: int) -> Tensor:
        self.runs += 1
        self.lengths_run.add(query_len)
        tensors, num_rows = self._harness.buffers.tensors, num_requests * query_len
        assert (tensors.seq_lens[num_requests : self._largest] == 0).all()
        for name, padding in (("input_ids", 0), ("positions", 0), ("slot_mapping", -1)):
            assert (getattr(tensors, name)[num_rows : self._largest * query_len] == padding).all(), name
        written = tensors.slot_mapping[:num_rows] >= 0
        for name in ("input_ids", "positions"):
            assert (getattr(tensors, name)[:num_rows][~written] == 0).all(), name
        metadata = self._harness.buffers.decode_metadata(num_requests, MAX_MODEL_LEN, query_len)
        # This backend plans with numbers on the host, and writes every token; a backend for graphs does neither.
        metadata.seq_lens_host[:] = tensors.seq_lens[:num_requests].numpy()
        spare = BLOCK_SIZE * self._harness.spare_block
        metadata = dataclasses.replace(metadata, slot_mapping=metadata.slot_mapping.where(written, spare), plan={})
        with forward_context(ForwardContext(metadata, self._harness.kv_caches)):
            hidden = self._harness.model(tensors.input_ids[:num_rows], tensors.positions[:num_rows])
        return self._harness.model.compute_logits(hidden)


def poison(tensor: Tensor) -> Tensor:
    """Numbers that nothing can take for right."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)
