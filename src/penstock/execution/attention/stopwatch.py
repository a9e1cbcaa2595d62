"""Times attention backends on a GPU over the representative steps of choice.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.execution.attention.backend import AttentionBackend, KVCache, KVCacheSpec
from penstock.execution.attention.choice import DECODE, PREFILL, Step
from penstock.execution.attention.context import AttentionMetadata

# Calls in a row that are measured together; 64 contexts of 1,024 tokens do not fit into the caches of a GPU, so that each reads them anew.
_CALLS = 4
# How long the device is kept busy while the calls are queued, so that it then runs them without waiting for the host: about 2 ms.
_BUSY_CYCLES = 4_000_000


@dataclass(frozen=True)
class Inputs:
    """Queries of a step, and its shape over blocks in random order."""

    query: Tensor
    metadata: AttentionMetadata


class DeviceStopwatch:
    """A Stopwatch (choice.py) over one layer's cache, which all candidates have to lay out alike."""

    def __init__(
        self,
        layout: AttentionBackend,
        device: torch.device,
        spec: KVCacheSpec,
        arithmetic: torch.dtype,
        num_heads: int,
    ) -> None:
        """layout: the backend that allocates the cache. Takes as much memory as the larger step's keys and values and raises
        torch.OutOfMemoryError when that is not there."""
        generator = torch.Generator(device).manual_seed(0)
        blocks = max(step.requests * -(-step.context // spec.block_size) for step in (DECODE, PREFILL))
        self.cache: KVCache = layout.allocate_kv_cache(blocks, spec, device)
        for tensor in (self.cache.key, self.cache.value):
            if tensor.dtype.itemsize > 1:
                tensor.normal_(generator=generator)
        self.scale = spec.head_dim**-0.5
        order = torch.randperm(blocks, generator=generator, device=device, dtype=torch.int32)
        self.inputs = {
            step: Inputs(
                torch.randn(
                    (step.requests * step.tokens, num_heads, spec.head_dim),
                    generator=generator,
                    dtype=arithmetic,
                    device=device,
                ),
                step_metadata(step, order, spec.block_size),
            )
            for step in (DECODE, PREFILL)
        }

    def warm_up(self, backend: AttentionBackend, step: Step) -> None:
        """See Stopwatch."""
        inputs = self.inputs[step]
        backend.attend(inputs.query, self.cache, inputs.metadata, self.scale, None)
        if inputs.query.is_cuda:
            torch.cuda.synchronize(inputs.query.device)

    def seconds(self, backend: AttentionBackend, step: Step) -> float:
        """See Stopwatch."""
        inputs = self.inputs[step]
        start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_BUSY_CYCLES)  # type: ignore[no-untyped-call]  # there is no public way to keep a device busy for a while
        start.record()
        for _ in range(_CALLS):
            backend.attend(inputs.query, self.cache, inputs.metadata, self.scale, None)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / _CALLS


def step_metadata(step: Step, blocks: Tensor, block_size: int) -> AttentionMetadata:
    """The shape of a step whose requests have `blocks` (int32, as many as it needs or more), one after the other."""
    per_request = -(-step.context // block_size)
    tables = blocks[: step.requests * per_request].view(step.requests, per_request)
    lengths = np.full(step.requests, step.context, dtype=np.int32)
    starts = np.arange(step.requests + 1, dtype=np.int32) * np.int32(step.tokens)
    positions = torch.arange(step.context - step.tokens, step.context, device=blocks.device)
    slots = tables[:, positions // block_size].to(torch.int64) * block_size + positions % block_size
    return AttentionMetadata(
        query_start=torch.from_numpy(starts).to(blocks.device),
        seq_lens=torch.from_numpy(lengths).to(blocks.device),
        block_tables=tables,
        slot_mapping=slots.flatten(),
        num_decodes=step.requests if step.tokens == 1 else 0,
        query_start_host=starts,
        seq_lens_host=lengths,
        max_seq_len=step.context,
    )
