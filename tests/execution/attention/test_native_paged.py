"""The native backend against attention written out, for every instruction set; bit by bit the same in whatever company; and its cache."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import KVCache, KVCacheSpec, check_cache, get_attention_backend
from penstock.execution.attention.native_paged import NativePagedAttention
from penstock.execution.attention.torch_paged import TorchPagedAttention
from penstock.execution.kernels import native
from penstock.execution.kernels.attention import attention_twin, read_cached
from penstock.testing.paged_model import make_metadata
from tests.execution.kernels.conftest import usable_instruction_sets

pytestmark = pytest.mark.skipif(not native.native_available(), reason="no native kernels")

CPU = torch.device("cpu")
ISAS = usable_instruction_sets()
KV_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
BACKEND = NativePagedAttention()


@dataclass(frozen=True)
class Shape:
    """Heads, KV heads, head size and tokens of a block."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    block_size: int = 16


@dataclass(frozen=True)
class Contexts:
    """Requests with random keys and values in a cache of shuffled blocks; all other slots hold NaN (or the largest integer)."""

    shape: Shape
    tables: list[list[int]]
    lengths: list[int]
    cache: KVCache

    def attend(
        self, query: Tensor, requests: list[int], seq_lens: list[int], query_lens: list[int], window: int | None
    ) -> Tensor:
        """One step over some of the requests, each up to seq_lens[i]."""
        metadata = make_metadata(
            [self.tables[request] for request in requests], seq_lens, query_lens, self.shape.block_size, CPU
        )
        return BACKEND.attend(query, self.cache, metadata, 0.25, window)

    def twin(self, query: Tensor, request: int, seq_len: int, window: int | None) -> Tensor:
        """The same for one request's last tokens, in float64 over what the cache holds."""
        blocks = torch.tensor(self.tables[request])
        key = read_cached(self.cache.key, self.cache.key_scales, blocks, keys=True)[:seq_len]
        value = read_cached(self.cache.value, self.cache.value_scales, blocks, keys=False)[:seq_len]
        return attention_twin(query, key, value, 0.25, window, torch.float64)


def make_contexts(lengths: list[int], shape: Shape, kv_dtype: torch.dtype = torch.float32) -> Contexts:
    sizes = [-(-length // shape.block_size) for length in lengths]
    free = list(range(sum(sizes) + 2))
    random.Random(0).shuffle(free)
    tables = [[free.pop() for _ in range(size)] for size in sizes]
    cache = BACKEND.allocate_kv_cache(
        len(free) + sum(sizes), KVCacheSpec(shape.block_size, shape.kv_heads, shape.dim, kv_dtype, kv_dtype), CPU
    )
    for tensor in cache.tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 127)
    generator = torch.Generator().manual_seed(len(lengths))
    rows = torch.randn(2, sum(lengths), shape.kv_heads, shape.dim, generator=generator)
    slots = make_metadata(tables, lengths, lengths, shape.block_size, CPU).slot_mapping
    BACKEND.write(cache, rows[0], rows[1], slots)
    return Contexts(shape, tables, lengths, cache)


def queries(count: int, shape: Shape) -> Tensor:
    return torch.randn(count, shape.heads, shape.dim, generator=torch.Generator().manual_seed(count))


@contextmanager
def running(name: str) -> Iterator[None]:
    """The kernels of one instruction set, and afterwards those that ran before."""
    before = native.isa()
    assert native.library().penstock_choose_isa(name.encode())
    try:
        yield
    finally:
        assert native.library().penstock_choose_isa(before.encode())


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set that this machine can run."""
    with running(request.param):
        yield


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """Tests here may change the number of threads."""
    before = torch.get_num_threads()
    yield
    native.set_threads(before)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(6, 2, 32), Shape(14, 2, 64, 32), Shape(3, 3, 20), Shape(8, 1, 80, 48), Shape(2, 2, 128)]
)
@pytest.mark.usefixtures("isa")
def test_equals_attention_written_out(shape: Shape, kv_dtype: torch.dtype) -> None:
    lengths, query_lens = [1, 530, 60, 20, 600, 90], [1, 1, 1, 20, 5, 70]
    contexts = make_contexts(lengths, shape, kv_dtype)
    query = queries(sum(query_lens), shape)
    for window in (None, 1, 7, 100):
        actual = contexts.attend(query, list(range(len(lengths))), lengths, query_lens, window)
        for request, rows in enumerate(torch.split(query, query_lens)):
            part = torch.split(actual, query_lens)[request]
            expected = contexts.twin(rows, request, lengths[request], window)
            torch.testing.assert_close(part.double(), expected, atol=1e-5, rtol=1e-5)


def test_what_the_cache_gives_back() -> None:
    """Exactly for float32, rounded for the others."""
    for kv_dtype, tolerance in ((torch.float32, 0.0), (torch.bfloat16, 2**-8), (torch.int8, 0.5 / 127)):
        contexts = make_contexts([50], Shape(), kv_dtype)
        rows = torch.randn(2, 50, 2, 16, generator=torch.Generator().manual_seed(1))
        blocks = torch.tensor(contexts.tables[0])
        cache = contexts.cache
        for tiles, scales, written, keys in (
            (cache.key, cache.key_scales, rows[0], True),
            (cache.value, cache.value_scales, rows[1], False),
        ):
            stored = read_cached(tiles, scales, blocks, keys=keys)[:50]
            bound = tolerance * written.abs().amax(-1, keepdim=True) * 1.001
            assert ((stored - written).abs() <= bound).all()


BATCHES = st.lists(
    st.tuples(st.integers(0, 5), st.floats(0.001, 1.0), st.one_of(st.just(1), st.integers(1, 300))),
    min_size=1,
    max_size=5,
)
LENGTHS = [3, 40, 511, 513, 700, 1100]


@functools.cache
def shared_contexts(shape: Shape, kv_dtype: torch.dtype) -> Contexts:
    """Contexts of LENGTHS, which the examples of one test only read."""
    return make_contexts(LENGTHS, shape, kv_dtype)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(batch=BATCHES, window=st.sampled_from([None, 5, 70, 600]), count=st.sampled_from([1, 2, 3]))
def test_a_row_does_not_depend_on_its_company(
    kv_dtype: torch.dtype, name: str, batch: list[tuple[int, float, int]], window: int | None, count: int
) -> None:
    """Any batch of chunks and decodes, on any number of threads, gives the bits of each token decoded alone on one thread."""
    shape = Shape(6, 2, 24)
    contexts = shared_contexts(shape, kv_dtype)
    requests = [request for request, _, _ in batch]
    seq_lens = [max(1, int(share * LENGTHS[request])) for request, share, _ in batch]
    query_lens = [min(length, size) for length, (_, _, size) in zip(seq_lens, batch, strict=True)]
    query = queries(sum(query_lens), shape)
    with running(name):
        native.set_threads(count)
        together = torch.split(contexts.attend(query, requests, seq_lens, query_lens, window), query_lens)
        native.set_threads(1)
        for index, rows in enumerate(torch.split(query, query_lens)):
            for token in {0, len(rows) // 3, len(rows) - 1}:
                seq_len = seq_lens[index] - len(rows) + token + 1
                alone = contexts.attend(rows[token : token + 1], [requests[index]], [seq_len], [1], window)
                assert torch.equal(alone[0], together[index][token]), (index, token, seq_len)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_in_half_precision(dtype: torch.dtype) -> None:
    contexts = make_contexts([40, 90], Shape())
    query = queries(31, Shape()).to(dtype)
    actual = contexts.attend(query, [0, 1], [40, 90], [1, 30], None)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual[1:].double(), contexts.twin(query[1:], 1, 90, None), atol=1e-2, rtol=1e-2)


def test_queries_may_be_a_view() -> None:
    contexts = make_contexts([40], Shape())
    wide = torch.randn(7, 8, 16)
    narrow = wide[:, 2:6]
    assert torch.equal(
        contexts.attend(narrow, [0], [40], [7], None), contexts.attend(narrow.contiguous(), [0], [40], [7], None)
    )


@dataclass(frozen=True)
class Swap:
    source: int
    target: int


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_blocks_are_copied_and_swapped_whole(kv_dtype: torch.dtype) -> None:
    def random_cache() -> KVCache:
        cache = BACKEND.allocate_kv_cache(6, KVCacheSpec(16, 2, 16, kv_dtype, kv_dtype), CPU)
        for tensor in cache.tensors:
            tensor.random_(-100, 100)
        return cache

    caches = [random_cache() for _ in range(2)]
    before = [[tensor.clone() for tensor in cache.tensors] for cache in caches]
    BACKEND.copy_blocks(caches, torch.tensor([1, 4]), torch.tensor([0, 5]))
    host = [BACKEND.allocate_host_cache(4, KVCacheSpec(16, 2, 16, kv_dtype, kv_dtype), CPU) for _ in caches]
    BACKEND.swap_out(caches, host, [Swap(2, 0), Swap(5, 3)])
    BACKEND.swap_in(caches, host, [Swap(3, 1), Swap(0, 4)])
    BACKEND.swap_in(caches, host, [])
    for cache, old in zip(caches, before, strict=True):
        assert len(cache.tensors) == (4 if kv_dtype == torch.int8 else 2)
        for now, then in zip(cache.tensors, old, strict=True):
            assert torch.equal(now, then[[1, 4, 2, 3, 2, 4]])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_bytes_per_block_is_what_a_block_takes(kv_dtype: torch.dtype) -> None:
    cache = BACKEND.allocate_kv_cache(10, KVCacheSpec(32, 2, 24, kv_dtype, kv_dtype), CPU)
    assert cache.nbytes == 10 * BACKEND.bytes_per_block(KVCacheSpec(32, 2, 24, kv_dtype, kv_dtype))
    assert (cache.num_blocks, cache.block_size) == (10, 32)
    assert not any(tensor.any() for tensor in cache.tensors)


def test_auto_takes_native_where_it_can() -> None:
    def chosen(block_size: int = 16, head_dim: int = 64, kv_dtype: torch.dtype = torch.float32) -> str:
        spec = KVCacheSpec(block_size, 2, head_dim, kv_dtype, kv_dtype)
        return get_attention_backend("auto", CPU, spec=spec, arithmetic=torch.float32).name

    assert chosen() == chosen(block_size=48) == chosen(kv_dtype=torch.int8) == "native"
    assert chosen(block_size=8) == chosen(head_dim=33) == chosen(kv_dtype=torch.float16) == "torch"
    assert get_attention_backend("native", CPU).name == "native"


def test_what_cannot_be_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"--block-size 8 .* multiple of 16"):
        BACKEND.allocate_kv_cache(1, KVCacheSpec(8, 2, 16, torch.float32, torch.float32), CPU)
    with pytest.raises(ConfigError, match=r"even head size, not 15"):
        BACKEND.allocate_kv_cache(1, KVCacheSpec(16, 2, 15, torch.float32, torch.float32), CPU)
    with pytest.raises(ConfigError, match=r"no float16 KV cache; set --kv-cache-dtype"):
        BACKEND.allocate_kv_cache(1, KVCacheSpec(16, 2, 16, torch.float16, torch.float16), CPU)
    with pytest.raises(ConfigError, match=r"it is for CPUs"):
        BACKEND.allocate_kv_cache(1, KVCacheSpec(16, 2, 16, torch.float32, torch.float32), torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"--attention-backend torch cannot do this KV cache: .*float32, not in int8"):
        check_cache(TorchPagedAttention(), KVCacheSpec(16, 2, 16, torch.int8, torch.int8), torch.float32)
    check_cache(BACKEND, KVCacheSpec(16, 2, 16, torch.int8, torch.int8), torch.float32)
    check_cache(TorchPagedAttention(), KVCacheSpec(16, 2, 16, torch.bfloat16, torch.bfloat16), torch.bfloat16)


def test_native_is_refused_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.execution.attention.backend.native_available", lambda: False)
    monkeypatch.setattr("penstock.execution.attention.backend.unavailable_reason", lambda: "never built")
    spec = KVCacheSpec(16, 2, 64, torch.float32, torch.float32)
    assert get_attention_backend("auto", CPU, spec=spec, arithmetic=torch.float32).name == "torch"
    with pytest.raises(ConfigError, match=r"no native CPU kernels \(never built\); use auto"):
        get_attention_backend("native", CPU)


def test_layers_with_different_windows_share_one_step() -> None:
    contexts = make_contexts([90], Shape())
    query = queries(12, Shape())
    metadata = make_metadata(contexts.tables, [90], [12], 16, CPU)
    other = dataclasses.replace(contexts.cache, key=contexts.cache.key * 2)
    for window in (None, 10, None, 10):
        actual = BACKEND.attend(query, contexts.cache, metadata, 0.25, window)
        torch.testing.assert_close(actual.double(), contexts.twin(query, 0, 90, window), atol=1e-5, rtol=1e-5)
        doubled = BACKEND.attend(query, other, metadata, 0.125, window)
        torch.testing.assert_close(doubled, actual)
