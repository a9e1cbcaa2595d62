"""The ranks of a model in one process, each in its own thread: what tensor and pipeline parallelism compute, without processes.

model = RankedModel(folder, tensor_parallel_size=2, stages=2)
logits = model.step({"a": [1, 2, 3]})["a"]
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from penstock.execution.attention.backend import KVCache, KVCacheSpec
from penstock.execution.attention.context import ForwardContext, forward_context
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import Slot
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.decoder import CausalLM
from penstock.execution.models.loader import model_slots
from penstock.execution.models.registry import build_model
from penstock.execution.parallel.groups import Collectives, ModelPart, PipelineStage, TensorParallel
from penstock.execution.parallel.sharding import local_heads
from penstock.testing.paged_model import PagedSequences, PagedStep

# Seconds after which a rank that waits for one that failed gives up.
_PATIENCE = 30.0


class Meeting:
    """Where the threads of one group meet. one_at_a_time: only one of them computes while the others wait, for code that no two threads may
    run, such as Triton's interpreter."""

    def __init__(self, size: int, *, one_at_a_time: bool = False) -> None:
        self.size = size
        self.turn = threading.Lock() if one_at_a_time else None
        self.barrier = threading.Barrier(size, timeout=_PATIENCE)
        self.parts: dict[int, Tensor] = {}

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """What all ranks bring, in their order."""
        if self.turn is None:
            return self._exchanged(rank, tensor)
        self.turn.release()
        try:
            return self._exchanged(rank, tensor)
        finally:
            self.turn.acquire()

    def _exchanged(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.parts[rank] = tensor
        self.barrier.wait()
        parts = [self.parts[rank] for rank in range(self.size)]
        self.barrier.wait()
        return parts


class ThreadCollectives:
    """Collectives of one rank among threads. Counts what is called: sums, gathers. Raises RuntimeError when another thread has failed."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self._rank = rank
        self._meeting = meeting
        self.sums = 0
        self.gathers = 0

    def all_reduce(self, tensor: Tensor) -> None:
        self.sums += 1
        total, *others = self._meeting.exchange(self._rank, tensor.clone())
        total = total.clone()
        for part in others:
            total += part
        tensor.copy_(total)

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.gathers += 1
        return torch.cat(self._meeting.exchange(self._rank, tensor), dim=-1)


def run_ranks(bodies: Sequence[Callable[[], Tensor]], meeting: Meeting | None = None) -> list[Tensor]:
    """What each body returns, all of them run at the same time. Raises the first failure; those who wait at `meeting` then fail too."""

    def guarded(body: Callable[[], Tensor]) -> Tensor:
        try:
            with turn:
                return body()
        except BaseException:
            if meeting is not None:
                meeting.barrier.abort()
            raise

    turn = nullcontext() if meeting is None or meeting.turn is None else meeting.turn

    with ThreadPoolExecutor(len(bodies)) as pool:
        futures = [pool.submit(guarded, body) for body in bodies]
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def part_of(value: Tensor, slot: Slot) -> Tensor:
    """The part of a checkpoint's tensor that belongs into `slot`, in memory of its own."""
    rows, columns = slot.shard.rows, slot.shard.columns
    part = value if rows is None else value[rows[0] : rows[1]]
    return (part if columns is None else part[:, columns[0] : columns[1]]).clone()


def fill_from_whole(model: CausalLM, weights: Mapping[str, Tensor]) -> None:
    """Fill every place of `model` with its part of the checkpoint's tensors."""
    for (name, packed), slot in model_slots(model).items():
        parts = name.split(".")
        for module, place in model.packed_modules.items():
            if place == (parts[-2], packed):
                parts[-2] = module
        value = weights[".".join(parts)]
        if tuple(value.shape) != slot.shape:
            raise ValueError(f"{name} is {tuple(value.shape)} in the checkpoint and {slot.shape} in the model")
        part = part_of(value, slot)
        if tuple(part.shape) != slot.shard.shape(slot.shape):
            raise ValueError(f"{name}: the shard {slot.shard} is {tuple(part.shape)}")
        slot.fill(part)
    model.finish_loading()


@dataclass(frozen=True)
class _Rank:
    model: CausalLM
    kv_caches: list[KVCache]


class RankedModel:
    """A float checkpoint in `tensor_parallel_size` times `stages` parts, with KV caches and sequences. Steps as in PagedModel.

    options: of the one rank that it would be without parts. collectives: of all ranks, stage after stage, instead of ThreadCollectives.
    """

    def __init__(
        self,
        folder: Path,
        options: LayerOptions,
        *,
        tensor_parallel_size: int = 1,
        stages: int = 1,
        collectives: Sequence[Collectives] | None = None,
        num_blocks: int = 64,
        block_size: int = 16,
    ) -> None:
        from safetensors.torch import load_file

        self.config = ModelConfig.from_folder(folder)
        weights = load_file(folder / "model.safetensors")
        size = tensor_parallel_size
        self._meetings = [Meeting(size, one_at_a_time=options.triton) for _ in range(stages)]
        if collectives is None:
            collectives = [ThreadCollectives(rank, meeting) for meeting in self._meetings for rank in range(size)]
        self.collectives = collectives
        self._stages: list[list[_Rank]] = []
        for index in range(stages):
            tensors = [TensorParallel()]
            if size > 1:
                tensors = [TensorParallel(rank, size, collectives[index * size + rank]) for rank in range(size)]
            parts = [ModelPart(tensor, PipelineStage(index, stages)) for tensor in tensors]
            self._stages.append(
                [self._rank(replace(options, part=part), weights, num_blocks, block_size) for part in parts]
            )
        self._paged = PagedSequences(num_blocks, block_size, 0, options.device)

    @property
    def models(self) -> list[list[CausalLM]]:
        """By stage and rank."""
        return [[rank.model for rank in ranks] for ranks in self._stages]

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Logits [tokens, vocab_size] of each sequence. Raises AssertionError when ranks that compute the same differ in a bit."""
        step = self._paged.advance(tokens)
        residual: Tensor | None = None
        for ranks, meeting in zip(self._stages, self._meetings, strict=True):
            bodies = [partial(_forward, rank, step, residual) for rank in ranks]
            results = run_ranks(bodies, meeting)
            residual = results[0]
            if not all(torch.equal(result, residual) for result in results):
                raise AssertionError("ranks of one stage have different results")
        if residual is None:
            raise AssertionError("there are no stages")
        return dict(zip(step.names, torch.split(residual, step.query_lens), strict=True))

    def finish(self, name: str) -> None:
        self._paged.finish(name)

    def _rank(self, options: LayerOptions, weights: Mapping[str, Tensor], num_blocks: int, block_size: int) -> _Rank:
        config, part = self.config, options.part
        model = build_model(config, options)
        fill_from_whole(model, weights)
        model.prepare(num_blocks * block_size)
        _, num_kv_heads = local_heads(config.num_heads, config.num_kv_heads, part.tensor.rank, part.tensor.size)
        spec = KVCacheSpec(block_size, num_kv_heads, config.head_dim, options.dtype, options.dtype)
        caches = [
            options.attention_backend.allocate_kv_cache(num_blocks, spec, options.device)
            for _ in part.stage.layers(config.num_layers)
        ]
        for cache in caches:
            cache.key.fill_(torch.nan)
            cache.value.fill_(torch.nan)
        return _Rank(model, caches)


def _forward(rank: _Rank, step: PagedStep, residual: Tensor | None) -> Tensor:
    """One rank's residual, or logits in the last stage."""
    metadata = replace(step.metadata, plan={})
    given = None if residual is None else residual.clone()
    with torch.inference_mode(), forward_context(ForwardContext(metadata, rank.kv_caches)):
        hidden: Tensor = rank.model(step.input_ids, step.positions, given)
        return rank.model.compute_logits(hidden) if rank.model.part.stage.is_last else hidden
