"""The torch backend against attention written out, over shuffled block tables; and its cache operations."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.core.errors import ConfigError
from penstock.execution.attention import torch_paged
from penstock.execution.attention.backend import KVCache, KVCacheSpec, get_attention_backend
from penstock.execution.attention.context import AttentionMetadata
from penstock.execution.attention.torch_paged import TorchPagedAttention, group_by_length
from penstock.testing.paged_model import make_metadata

BLOCK_SIZE = 8
HEAD_DIM = 16
CPU = torch.device("cpu")


@dataclass
class Step:
    """Random queries over random contexts. keys and values: per request [seq_len, KVH, D]; the cache's other slots hold NaN."""

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    cache: KVCache
    metadata: AttentionMetadata


def make_step(
    seq_lens: list[int],
    query_lens: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Step:
    generator = torch.Generator().manual_seed(sum(seq_lens))
    sizes = [-(-length // BLOCK_SIZE) for length in seq_lens]
    free = list(range(sum(sizes) + 3))
    random.Random(0).shuffle(free)
    tables = [[free.pop() for _ in range(size)] for size in sizes]
    cache = TorchPagedAttention().allocate_kv_cache(
        sum(sizes) + 3, KVCacheSpec(BLOCK_SIZE, num_kv_heads, HEAD_DIM, dtype, dtype), CPU
    )
    cache.key.fill_(torch.nan)
    cache.value.fill_(torch.nan)
    keys, values = [
        [torch.randn(length, num_kv_heads, HEAD_DIM, generator=generator).to(dtype) for length in seq_lens]
        for _ in range(2)
    ]
    whole = make_metadata(tables, seq_lens, seq_lens, BLOCK_SIZE, CPU)
    TorchPagedAttention().write(cache, torch.cat(keys), torch.cat(values), whole.slot_mapping)
    query = torch.randn(sum(query_lens), num_heads, HEAD_DIM, generator=generator).to(dtype)
    return Step(query, keys, values, cache, make_metadata(tables, seq_lens, query_lens, BLOCK_SIZE, CPU))


def written_out(step: Step, scale: float, sliding_window: int | None) -> Tensor:
    """Attention token by token and head by head, in float64."""
    output = torch.empty(step.query.shape, dtype=torch.float64)
    starts = step.metadata.query_start_host
    for request, (key, value) in enumerate(zip(step.keys, step.values, strict=True)):
        group = step.query.shape[1] // key.shape[1]
        for token in range(starts[request], starts[request + 1]):
            position = len(key) - int(starts[request + 1]) + token
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(step.query.shape[1]):
                visible = key[first : position + 1, head // group].double()
                weights = (visible @ step.query[token, head].double() * scale).softmax(0)
                output[token, head] = weights @ value[first : position + 1, head // group].double()
    return output


@pytest.mark.parametrize("sliding_window", [None, 1, 7, 40])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [
        ([1], [1]),
        ([37], [1]),
        ([1, 200, 9, 33, 180, 8], [1, 1, 1, 1, 1, 1]),
        ([5, 24], [5, 24]),
        ([30, 41, 16], [7, 2, 16]),
        ([3, 150, 60, 20, 31], [1, 1, 1, 20, 4]),
        ([12, 25], [12, 1]),
    ],
)
def test_attend_equals_attention_written_out(
    seq_lens: list[int], query_lens: list[int], num_kv_heads: int, sliding_window: int | None
) -> None:
    step = make_step(seq_lens, query_lens, num_kv_heads=num_kv_heads)
    actual = TorchPagedAttention().attend(step.query, step.cache, step.metadata, 0.3, sliding_window)
    torch.testing.assert_close(actual.double(), written_out(step, 0.3, sliding_window), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_in_half_precision(dtype: torch.dtype) -> None:
    step = make_step([3, 150, 60, 20, 31], [1, 1, 1, 20, 4], dtype=dtype)
    actual = TorchPagedAttention().attend(step.query, step.cache, step.metadata, 0.25, None)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), written_out(step, 0.25, None), atol=2e-2, rtol=2e-2)


def test_layers_with_different_windows_share_one_step() -> None:
    step = make_step([50, 90, 30], [1, 1, 12])
    backend = TorchPagedAttention()
    for sliding_window in (None, 10, None, 10):
        actual = backend.attend(step.query, step.cache, step.metadata, 0.25, sliding_window)
        torch.testing.assert_close(actual.double(), written_out(step, 0.25, sliding_window), atol=2e-6, rtol=1e-5)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="measured with AVX-512 only")
@pytest.mark.parametrize("sliding_window", [None, 100])
def test_a_decode_does_not_depend_on_who_shares_its_batch(sliding_window: int | None) -> None:
    """To the last bit, over contexts of all sizes."""
    lengths = [1, 15, 16, 17, 100, 130, 257, 300, 384, 385, 450, 512, 513, 700, 800, 1000, 1024, 1100, 1400, 1900]
    step = make_step(lengths, [1] * len(lengths))
    backend = TorchPagedAttention()
    together = backend.attend(step.query, step.cache, step.metadata, 0.25, sliding_window)
    tables = step.metadata.block_tables.tolist()
    for row, length in enumerate(lengths):
        for other in (row, *random.Random(row).sample(range(len(lengths)), 4)):
            metadata = make_metadata([tables[row], tables[other]], [length, lengths[other]], [1, 1], BLOCK_SIZE, CPU)
            pair = backend.attend(step.query[[row, other]], step.cache, metadata, 0.25, sliding_window)
            assert torch.equal(pair[0], together[row]), (length, lengths[other])


def test_one_long_context_does_not_pad_the_short_ones() -> None:
    lengths = np.array([100, 4000, 120, 90, 2100, 5])
    groups = [group.tolist() for group in group_by_length(lengths)]
    assert groups == [[1, 4], [0, 2, 3, 5]]
    assert [group.tolist() for group in group_by_length(np.array([384, 200, 385, 700]))] == [[2, 3], [0, 1]]
    assert group_by_length(np.array([], dtype=np.int64)) == []


def test_copy_blocks_copies_whole_blocks_in_every_layer() -> None:
    backend = TorchPagedAttention()
    caches = [random_cache(6) for _ in range(2)]
    before = [KVCache(cache.key.clone(), cache.value.clone()) for cache in caches]
    backend.copy_blocks(caches, torch.tensor([1, 4]), torch.tensor([0, 5]))
    for cache, old in zip(caches, before, strict=True):
        for now, then in ((cache.key, old.key), (cache.value, old.value)):
            assert torch.equal(now, then[[1, 1, 2, 3, 4, 4]])


@dataclass(frozen=True)
class Swap:
    source: int
    target: int


def test_swapped_blocks_come_back_elsewhere() -> None:
    backend = TorchPagedAttention()
    caches = [random_cache(6) for _ in range(2)]
    before = [KVCache(cache.key.clone(), cache.value.clone()) for cache in caches]
    host = [
        backend.allocate_host_cache(4, KVCacheSpec(BLOCK_SIZE, 2, HEAD_DIM, torch.float32, torch.float32), CPU)
        for _ in caches
    ]
    backend.swap_out(caches, host, [Swap(2, 0), Swap(5, 3)])
    for cache in caches:
        cache.key.zero_()
        cache.value.zero_()
    backend.swap_in(caches, host, [Swap(3, 1), Swap(0, 4)])
    backend.swap_in(caches, host, [])
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache.key[[1, 4]], old.key[[5, 2]])
        assert torch.equal(cache.value[[1, 4]], old.value[[5, 2]])
        assert not cache.key[[0, 2, 3, 5]].any()


def test_bytes_per_block_is_what_a_block_takes() -> None:
    backend = TorchPagedAttention()
    cache = backend.allocate_kv_cache(10, KVCacheSpec(BLOCK_SIZE, 2, HEAD_DIM, torch.bfloat16, torch.bfloat16), CPU)
    assert cache.nbytes == 10 * backend.bytes_per_block(
        KVCacheSpec(BLOCK_SIZE, 2, HEAD_DIM, torch.bfloat16, torch.bfloat16)
    )
    assert cache.num_blocks == 10


def test_unknown_backend_lists_the_supported() -> None:
    assert get_attention_backend("auto", CPU).name == "torch"
    with pytest.raises(ConfigError, match=r"'flash'.*supported: auto, .*native, torch, triton"):
        get_attention_backend("flash", CPU)


def random_cache(num_blocks: int) -> KVCache:
    cache = TorchPagedAttention().allocate_kv_cache(
        num_blocks, KVCacheSpec(BLOCK_SIZE, 2, HEAD_DIM, torch.float32, torch.float32), CPU
    )
    cache.key.normal_()
    cache.value.normal_()
    return cache


def test_long_chunks_are_attended_to_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_paged, "_MAX_CHUNK", 16)
    for sliding_window in (None, 20):
        step = make_step([3, 50, 70], [1, 50, 33])
        actual = TorchPagedAttention().attend(step.query, step.cache, step.metadata, 0.25, sliding_window)
        torch.testing.assert_close(actual.double(), written_out(step, 0.25, sliding_window), atol=2e-6, rtol=1e-5)
