"""Graphs of decode steps, recorded and replayed on a CPU: a recording there is the recorded function called again, so that whatever was
taken from the host when it was recorded shows as soon as the numbers are others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import KVCache
from penstock.execution.attention.context import AttentionMetadata, ForwardContext, forward_context
from penstock.execution.attention.torch_paged import TorchPagedAttention
from penstock.execution.layers.attention import Attention
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.runner.accelerator import HostAccelerator
from penstock.execution.runner.cuda_graphs import DecodeGraphs, graph_batch_sizes
from penstock.execution.runner.device_batch import DeviceBatch

MIB = 2**20
BLOCK_SIZE, MAX_MODEL_LEN, NUM_BLOCKS = 4, 64, 40
LARGEST = 6


class StaticAttention(TorchPagedAttention):
    """Attention that takes all numbers from device tensors, over the whole width of the block table."""

    supports_graphs = True

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        written = slot_mapping >= 0
        super().write(kv_cache, key[written], value[written], slot_mapping[written])

    def attend(
        self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, scale: float, sliding_window: int | None
    ) -> Tensor:
        num_requests, width = metadata.block_tables.shape
        grouped = query.view(num_requests, -1, *query.shape[1:])  # [R, Q, H, D]
        context = (num_requests, width * BLOCK_SIZE, *kv_cache.key.shape[2:])
        group = query.shape[1] // kv_cache.key.shape[2]
        key, value = (
            cache[metadata.block_tables.long()].view(context).repeat_interleave(group, dim=2)
            for cache in (kv_cache.key, kv_cache.value)
        )
        seq_lens = self.seq_lens(metadata).view(-1, 1, 1)
        last_visible = seq_lens - grouped.shape[1] + torch.arange(grouped.shape[1]).view(1, -1, 1)
        hidden = torch.arange(width * BLOCK_SIZE) > last_visible
        scores = torch.einsum("rqhd,rkhd->rhqk", grouped, key) * scale
        scores = scores.masked_fill(hidden.unsqueeze(1), -torch.inf)
        attended = torch.einsum("rhqk,rkhd->rqhd", scores.softmax(-1).nan_to_num(0.0), value)
        return attended.masked_fill(seq_lens.unsqueeze(-1) == 0, 0.0).reshape(query.shape)

    def seq_lens(self, metadata: AttentionMetadata) -> Tensor:
        return metadata.seq_lens


class BakesHostLengths(StaticAttention):
    """Wrong: reads the lengths that the host knew when the step was recorded."""

    def seq_lens(self, metadata: AttentionMetadata) -> Tensor:
        return torch.from_numpy(metadata.seq_lens_host)


class BakesFirstLengths(StaticAttention):
    """Wrong: keeps what it derived from an earlier step."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def seq_lens(self, metadata: AttentionMetadata) -> Tensor:
        return self._kept.setdefault(len(metadata.seq_lens), metadata.seq_lens.clone())


@pytest.fixture(scope="module")
def static(checkpoint: Path) -> LoadedModel:
    return load_model(
        EngineConfig(attention_backend="torch"), checkpoint, torch.device("cpu"), torch.float32, progress=False
    )


class Bench:
    """A model with `backend`, caches full of random numbers, the buffers of a device batch, and graphs over them."""

    def __init__(self, loaded: LoadedModel, backend: TorchPagedAttention, query_len: int = 1) -> None:
        self.model = loaded.model
        self.use(backend)
        self.query_len = query_len
        spec = dataclasses.replace(loaded.cache_spec, block_size=BLOCK_SIZE)
        generator = torch.Generator().manual_seed(5)
        self.kv_caches = [
            backend.allocate_kv_cache(NUM_BLOCKS, spec, torch.device("cpu")) for _ in range(loaded.config.num_layers)
        ]
        for cache in self.kv_caches:
            cache.key.normal_(generator=generator)
            cache.value.normal_(generator=generator)
        accelerator = HostAccelerator()
        self.batch = DeviceBatch(
            accelerator,
            max_slots=2 * LARGEST,
            max_requests=LARGEST,
            max_tokens=LARGEST * query_len,
            max_model_len=MAX_MODEL_LEN,
            block_size=BLOCK_SIZE,
        )
        self.graphs = DecodeGraphs(
            self.model,
            self.batch,
            accelerator,
            sizes=[1, 2, 4, LARGEST],
            max_seq_len=MAX_MODEL_LEN,
            logits=torch.zeros(LARGEST * query_len, loaded.config.vocab_size),
            query_len=query_len,
        )
        self._rng = np.random.default_rng(7)

    def use(self, backend: TorchPagedAttention) -> None:
        for module in self.model.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def prepare(self, contexts: Sequence[int]) -> AttentionMetadata:
        """Fill the buffers for requests whose contexts end with this step's tokens; every row behind them is padding whose block table is
        left over from others. Returns the metadata of exactly this step."""
        batch, length = self.batch, self.query_len
        free = self._rng.permutation(NUM_BLOCKS)
        batch.block_tables.copy_(torch.from_numpy(self._rng.integers(0, NUM_BLOCKS, batch.block_tables.shape)))
        batch.seq_lens.zero_()
        batch.input_ids.zero_()
        batch.positions.zero_()
        batch.slot_mapping.fill_(-1)
        for row, context in enumerate(contexts):
            blocks, free = np.split(free, [-(-context // BLOCK_SIZE)])
            positions = np.arange(context - length, context)
            tokens = slice(row * length, (row + 1) * length)
            batch.block_tables[row, : len(blocks)] = torch.from_numpy(blocks)
            batch.seq_lens[row] = context
            batch.input_ids[tokens] = torch.from_numpy(self._rng.integers(0, 256, length))
            batch.positions[tokens] = torch.from_numpy(positions)
            slots = blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            batch.slot_mapping[tokens] = torch.from_numpy(slots)
        return AttentionMetadata(
            query_start=torch.arange(len(contexts) + 1, dtype=torch.int32) * length,
            seq_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=batch.block_tables[: len(contexts)],
            slot_mapping=batch.slot_mapping[: len(contexts) * length],
            num_decodes=len(contexts) if length == 1 else 0,
            query_start_host=np.arange(len(contexts) + 1, dtype=np.int32) * np.int32(length),
            seq_lens_host=np.array(contexts, dtype=np.int32),
            max_seq_len=max(contexts),
        )

    def eager(self, metadata: AttentionMetadata) -> tuple[Tensor, list[KVCache]]:
        """Logits of the step run with torch's own backend over a copy of the caches, and the copy."""
        caches = [KVCache(cache.key.clone(), cache.value.clone()) for cache in self.kv_caches]
        num_tokens = metadata.num_tokens
        with torch.inference_mode(), forward_context(ForwardContext(metadata, caches)):
            hidden = self.model(self.batch.input_ids[:num_tokens], self.batch.positions[:num_tokens])
            return self.model.compute_logits(hidden), caches

    def errors(self, steps: Sequence[Sequence[int]], backend: TorchPagedAttention) -> list[float]:
        """The largest difference between a replay and an eager run of each step; caches included, outside which nothing may be written."""
        errors = []
        for contexts in steps:
            metadata = self.prepare(contexts)
            self.use(TorchPagedAttention())
            expected, caches = self.eager(metadata)
            self.use(backend)
            logits = self.graphs.run(len(contexts))
            assert logits.shape == expected.shape
            error = (logits - expected).abs().max()
            for ours, theirs in zip(self.kv_caches, caches, strict=True):
                error = max(error, (ours.key - theirs.key).abs().max(), (ours.value - theirs.value).abs().max())
            errors.append(float(error))
        return errors


DECODES = [[17], [3, 30], [9, 1, 21], [5, 40, 2, 8], [1, 2, 3, 4, 5], [11, 12, 13, 1, 30, 7], [60], [1]]
VERIFICATIONS = [[17], [3, 30], [9, 4, 21], [5, 40, 3, 8], [3, 4, 5, 6, 7], [11, 12, 13, 3, 30, 7]]


@pytest.mark.parametrize(("query_len", "steps"), [(1, DECODES), (3, VERIFICATIONS)])
def test_a_replay_gives_what_an_eager_step_gives(
    static: LoadedModel, query_len: int, steps: Sequence[Sequence[int]]
) -> None:
    backend = StaticAttention()
    bench = Bench(static, backend, query_len)
    bench.prepare([20, 3])
    bench.graphs.capture(bench.kv_caches)
    assert max(bench.errors(steps, backend)) < 1e-4


@pytest.mark.parametrize("make", [BakesHostLengths, BakesFirstLengths])
def test_a_number_from_the_host_in_a_graph_is_found_out(
    static: LoadedModel, make: Callable[[], StaticAttention]
) -> None:
    backend = make()
    bench = Bench(static, backend)
    bench.prepare([20, 3])
    bench.graphs.capture(bench.kv_caches)
    assert min(bench.errors([[9, 1, 21], [5, 40, 2, 8]], backend)) > 1e-2


def test_there_is_no_graph_for_more_requests_or_before_the_capture(static: LoadedModel) -> None:
    bench = Bench(static, StaticAttention())
    assert not bench.graphs.holds(1)
    bench.prepare([2])
    bench.graphs.capture(bench.kv_caches)
    assert bench.graphs.holds(LARGEST)
    assert not bench.graphs.holds(LARGEST + 1)


def test_all_replays_give_their_logits_in_one_place(static: LoadedModel) -> None:
    bench = Bench(static, StaticAttention())
    bench.prepare([2])
    bench.graphs.capture(bench.kv_caches)
    first, second = bench.graphs.run(1), bench.graphs.run(5)
    assert first.data_ptr() == second.data_ptr()
    assert (first.shape[0], second.shape[0]) == (1, 5)


def test_sizes_bound_the_padding() -> None:
    assert graph_batch_sizes(1) == [1]
    assert graph_batch_sizes(3) == [1, 2, 3]
    assert graph_batch_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert graph_batch_sizes(41)[-2:] == [40, 41]
    sizes = graph_batch_sizes(512)
    assert sizes[8:] == [48, 56, 64, 80, 96, 112, 128, *range(160, 513, 32)]
    assert graph_batch_sizes(600)[-3:] == [544, 576, 600]
    for smaller, larger in pairwise(sizes[4:]):
        assert larger - smaller - 1 <= 0.3 * larger


class CountedAccelerator(HostAccelerator):
    """Every graph takes a little memory, the first of a pool much more; at some size it runs out."""

    def __init__(self, free: int, *, fails_after: int = 1000) -> None:
        super().__init__()
        self.free = free
        self._recorded = 0
        self._fails_after = fails_after

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self._recorded += 1
        if self._recorded > self._fails_after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.free -= 100 * MIB if self._recorded == 1 else 2 * MIB
        return function

    def free_bytes(self) -> int:
        return self.free


def _counted(static: LoadedModel, accelerator: CountedAccelerator, sizes: list[int]) -> tuple[DecodeGraphs, Bench]:
    bench = Bench(static, StaticAttention())
    logits = torch.zeros(sizes[-1], 272)
    graphs = DecodeGraphs(static.model, bench.batch, accelerator, sizes=sizes, max_seq_len=MAX_MODEL_LEN, logits=logits)
    bench.prepare([2])
    return graphs, bench


@pytest.mark.parametrize(("sizes", "expected"), [([1, 2, 3, 4, 5, 6], 100 + 5 * 2), ([1, 2], 102), ([4], 100)])
def test_a_few_graphs_show_what_all_will_take(static: LoadedModel, sizes: list[int], expected: int) -> None:
    graphs, bench = _counted(static, CountedAccelerator(1000 * MIB), sizes)
    assert graphs.measure(bench.kv_caches) == expected * MIB


def test_the_account_says_what_there_is(static: LoadedModel, capfd: pytest.CaptureFixture[str]) -> None:
    graphs, bench = _counted(static, CountedAccelerator(1000 * MIB), [1, 2, 4])
    graphs.capture(bench.kv_caches)
    assert graphs.account.startswith("captured 3 graphs for batches up to 4 in 0.")
    assert graphs.account.endswith(" s, 104.0 MiB")
    assert "CUDA graphs" not in capfd.readouterr().err
    graphs.capture(bench.kv_caches, progress=True)
    assert "CUDA graphs: 100%" in capfd.readouterr().err


def test_memory_that_runs_out_is_one_line_with_the_fix(static: LoadedModel) -> None:
    graphs, bench = _counted(static, CountedAccelerator(130 * MIB, fails_after=1), [1, 2, 4])
    with pytest.raises(
        ConfigError, match=r"graph for 2 requests was captured, with 30\.0 MiB free: lower --cuda-graph"
    ) as caught:
        graphs.capture(bench.kv_caches)
    for flag in ("--cuda-graph-max-batch-size", "--memory-utilization", "--max-num-seqs", "--enforce-eager"):
        assert flag in str(caught.value)
    assert not graphs.holds(1)


def test_other_errors_stay_what_they_are(static: LoadedModel) -> None:
    class Broken(HostAccelerator):
        def record(self, function: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    bench = Bench(static, StaticAttention())
    logits = torch.zeros(1, 272)
    graphs = DecodeGraphs(static.model, bench.batch, Broken(), sizes=[1], max_seq_len=MAX_MODEL_LEN, logits=logits)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(bench.kv_caches)
