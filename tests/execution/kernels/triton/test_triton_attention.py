"""Paged attention against attention written out in float64, over shuffled blocks in memory that is otherwise poisoned."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.triton import support
from penstock.execution.kernels.triton.attention import num_splits, paged_attention, paged_attention_twin
from penstock.execution.kernels.triton.cache_write import write_twin

FP8 = torch.float8_e4m3fn
SCALE = 0.2
ON_GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """Requests with seq_lens[r] tokens of context of which the last query_lens[r] are asked for, the first num_decodes one each."""

    seq_lens: Sequence[int] = (50, 130, 0, 70, 33)
    query_lens: Sequence[int] = (1, 1, 1, 20, 33)
    num_decodes: int = 3
    kv_heads: int = 2
    group: int = 2
    dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    key_dtype: torch.dtype = torch.float32
    value_dtype: torch.dtype = torch.float32


@dataclass
class Step:
    query: Tensor
    caches: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    num_decodes: int

    def attend(self, window: int | None, max_query_len: int | None = None) -> Tensor:
        """Into memory that holds no numbers."""
        return paged_attention(
            self.query,
            *self.caches,
            query_start=self.query_start,
            seq_lens=self.seq_lens,
            block_tables=self.block_tables,
            num_decodes=self.num_decodes,
            max_query_len=max_query_len,
            scale=SCALE,
            sliding_window=window,
            output=torch.full_like(self.query, torch.nan),
        )

    def twin(self, window: int | None) -> Tensor:
        return paged_attention_twin(
            self.query,
            *self.caches,
            query_start=self.query_start,
            seq_lens=self.seq_lens,
            block_tables=self.block_tables,
            scale=SCALE,
            sliding_window=window,
        )

    def assert_equal_to_twin(self, window: int | None, max_query_len: int | None = None) -> None:
        tolerance = TOLERANCE[self.query.dtype]
        actual = self.attend(window, max_query_len).double().cpu()
        torch.testing.assert_close(actual, self.twin(window), atol=tolerance, rtol=tolerance)


def make_step(shape: Shape, device: torch.device) -> Step:
    random_numbers = torch.Generator().manual_seed(sum(shape.seq_lens))
    sizes = [-(-length // shape.block_size) for length in shape.seq_lens]
    free = list(range(sum(sizes) + 3))
    random.Random(1).shuffle(free)
    tables = torch.full((len(sizes), max(sizes) + 1), -1, dtype=torch.int32)
    slots: list[int] = []
    for request, (size, seq_len) in enumerate(zip(sizes, shape.seq_lens, strict=True)):
        table = [free.pop() for _ in range(size)]
        tables[request, :size] = torch.tensor(table, dtype=torch.int32)
        slots += [table[t // shape.block_size] * shape.block_size + t % shape.block_size for t in range(seq_len)]
    caches = poisoned_caches(sum(sizes) + 3, shape)
    key, value = torch.randn(2, len(slots), shape.kv_heads, shape.dim, generator=random_numbers)
    write_twin(key.to(shape.dtype), value.to(shape.dtype), *caches, torch.tensor(slots))
    num_tokens = sum(shape.query_lens)
    query = torch.randn(num_tokens, shape.kv_heads * shape.group, shape.dim, generator=random_numbers)
    query_start = torch.tensor([0, *shape.query_lens]).cumsum(0).to(torch.int32)
    return Step(
        query=query.to(shape.dtype).to(device),
        caches=tuple(None if x is None else x.to(device) for x in caches),  # type: ignore[arg-type]
        query_start=query_start.to(device),
        seq_lens=torch.tensor(shape.seq_lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        num_decodes=shape.num_decodes,
    )


def poisoned_caches(num_blocks: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Not a number wherever the type has that."""
    size = (num_blocks, shape.block_size, shape.kv_heads, shape.dim)

    def poisoned(dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype == shape.dtype:
            return torch.full(size, torch.nan, dtype=dtype), None
        cache = torch.full(size, 127, dtype=dtype) if dtype == torch.int8 else torch.full(size, torch.nan).to(dtype)
        return cache, torch.full(size[:3], torch.nan)

    (key, key_scales), (value, value_scales) = poisoned(shape.key_dtype), poisoned(shape.value_dtype)
    return key, value, key_scales, value_scales


@pytest.mark.parametrize("window", [None, 1, 10, 64])
def test_mixed_batch(window: int | None, device: torch.device) -> None:
    """Decodes, one of them without context, a chunk that continues a prompt and a whole prompt."""
    make_step(Shape(), device).assert_equal_to_twin(window)


@pytest.mark.parametrize(
    "shape",
    [
        Shape((40, 70), (1, 9), 1, kv_heads=2, group=1),
        Shape((40, 70), (1, 9), 1, kv_heads=1, group=7, dim=32),
        Shape((40, 70), (1, 9), 1, kv_heads=1, group=8, dim=128, block_size=32),
        Shape((70, 100), (1, 30), 1, kv_heads=2, group=4, dim=80, block_size=24),
        Shape((70, 100), (1, 30), 1, kv_heads=1, group=4, dim=16, block_size=8),
        Shape((3, 40), (3, 20), 0, group=3, dim=256),
    ],
)
@pytest.mark.parametrize("window", [None, 20])
def test_heads_and_blocks_of_all_sizes(shape: Shape, window: int | None, device: torch.device) -> None:
    make_step(shape, device).assert_equal_to_twin(window)


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if ON_GPU else [])])
@pytest.mark.parametrize("query_lens", [(1, 2, 3), (1, 130, 40)])
def test_half_precision(dtype: torch.dtype, query_lens: tuple[int, ...], device: torch.device) -> None:
    """In programs of the fewest and of the most rows."""
    shape = Shape((80, 130, 66), query_lens, 1, group=4, kv_heads=1)
    make_step(replace(shape, dtype=dtype, key_dtype=dtype, value_dtype=dtype), device).assert_equal_to_twin(None)


@pytest.mark.parametrize("capability", [90] if ON_GPU else [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])])
@pytest.mark.parametrize("rounded", [(torch.int8, torch.int8), (FP8, FP8), (None, FP8), (None, torch.int8)])
def test_rounded_caches(
    rounded: tuple[torch.dtype | None, torch.dtype],
    dtype: torch.dtype,
    capability: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the GPU has no 8-bit floats; both keys and values, or values only."""
    if not ON_GPU:
        monkeypatch.setattr(support, "gpu", lambda device: support.GPU(capability, 4))
    shape = Shape((50, 90), (1, 12), 1, dtype=dtype, key_dtype=rounded[0] or dtype, value_dtype=rounded[1])
    make_step(shape, device).assert_equal_to_twin(None)


def test_every_8_bit_float_is_read_exactly(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One visible token gives its value back. The values are all finite e4m3 numbers, the subnormal ones included."""
    for capability in (90,) if ON_GPU else (80, 90):
        if not ON_GPU:
            monkeypatch.setattr(support, "gpu", lambda device, capability=capability: support.GPU(capability, 4))
        step = make_step(
            Shape((1,), (1,), 1, kv_heads=1, group=1, dim=256, key_dtype=FP8, value_dtype=FP8), torch.device("cpu")
        )
        every = torch.arange(256, dtype=torch.uint8)
        every[every % 128 == 127] = 0
        value, scales = step.caches[1], step.caches[3]
        assert scales is not None
        value.view(torch.uint8)[step.block_tables[0, 0], 0, 0] = every
        scales[step.block_tables[0, 0], 0, 0] = 1.0
        moved = make_step(Shape((1,), (1,), 1, kv_heads=1, group=1, dim=256, key_dtype=FP8, value_dtype=FP8), device)
        moved.caches = tuple(None if x is None else x.to(device) for x in step.caches)  # type: ignore[assignment]
        assert torch.equal(moved.attend(None)[0, 0].cpu(), every.view(FP8).float())


@pytest.mark.parametrize("window", [None, 30])
def test_a_few_tokens_each(window: int | None, device: torch.device) -> None:
    """As when drafts are verified: contexts are split for several tokens, some of which see less of a split than others, or nothing."""
    shape = Shape((150, 67, 4, 0), (4, 3, 4, 2), 0, kv_heads=1)
    make_step(shape, device).assert_equal_to_twin(window, max_query_len=4)


def test_long_contexts_are_split(device: torch.device) -> None:
    """One decode fills the GPU, or one short chunk; there are splits that have no key."""
    make_step(Shape((333,), (1,), 1, kv_heads=1, group=4), device).assert_equal_to_twin(None)
    make_step(Shape((150,), (3,), 0, kv_heads=1, group=4), device).assert_equal_to_twin(None)
    make_step(Shape((333, 5), (1, 1), 2, kv_heads=1, group=4), device).assert_equal_to_twin(100)


def test_number_of_splits() -> None:
    """The fewest that fill the GPU; never more than there are tiles; none when there are programs enough."""
    assert num_splits(8, 1000, 264) == 29
    assert num_splits(8, 4, 264) == 4
    assert num_splits(256, 1000, 264) == num_splits(2048, 1000, 264) == 1
    assert num_splits(280, 1000, 264) > 1
    assert num_splits(1, 1000, 264) == 128
    assert num_splits(1, 1, 8) == 1


def test_a_decode_depends_on_nobody(device: torch.device) -> None:
    """To the last bit, as long as there are as many requests, and tables are as wide."""
    together = make_step(Shape((150, 40, 90), (1, 1, 1), 3), device)
    before = together.attend(None)
    together.seq_lens[1:] = torch.tensor([17, 0], dtype=torch.int32)
    together.query[1:] += 1
    assert torch.equal(together.attend(None)[0], before[0])
    assert not torch.equal(together.attend(None)[1], before[1])
    assert not together.attend(None)[2].any()


def test_the_same_launch_serves_other_numbers(device: torch.device) -> None:
    """Only the contents of tensors change, as in a graph that is replayed."""
    step = make_step(Shape((60, 45, 80, 31), (4, 4, 4, 4), 0), device)
    step.assert_equal_to_twin(None, max_query_len=8)
    step.query_start.copy_(torch.tensor([0, 8, 9, 9, 16]))
    step.seq_lens.copy_(torch.tensor([33, 45, 0, 0]))
    for max_query_len in (8, None):
        step.assert_equal_to_twin(None, max_query_len=max_query_len)


def test_queries_may_be_a_view(device: torch.device) -> None:
    step = make_step(Shape((40, 30), (1, 5), 1), device)
    expected = step.attend(None)
    wide = torch.full((6, 9, 64), torch.nan, device=device)
    wide[:, 2:6] = step.query
    step.query = wide[:, 2:6]
    actual = paged_attention(
        step.query,
        *step.caches,
        query_start=step.query_start,
        seq_lens=step.seq_lens,
        block_tables=step.block_tables,
        num_decodes=1,
        scale=SCALE,
        sliding_window=None,
    )
    assert torch.equal(actual, expected)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    step = make_step(Shape((40,), (1,), 1), device)
    key, value, _, _ = step.caches
    whole = step.query
    step.query = whole[:, :3]
    with pytest.raises(IntegrityError, match="query heads"):
        step.attend(None)
    step.query = whole
    step.caches = (key, value[:, :8], None, None)
    with pytest.raises(IntegrityError, match="cache does not fit"):
        step.attend(None)
    step.caches = (key, value.to(torch.int8), None, None)
    with pytest.raises(IntegrityError, match="int8 without scales"):
        step.attend(None)
    step.caches = (key.half(), value, None, None)
    with pytest.raises(IntegrityError, match=r"cache of torch\.float16"):
        step.attend(None)


@pytest.mark.skipif(not ON_GPU, reason="as large as real ones: for a GPU")
@pytest.mark.parametrize("key_dtype", [torch.bfloat16, torch.int8, FP8])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_large_shapes(dim: int, key_dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(
        (5000, 900, 1, 0, 3000, 2100, 64),
        (1, 1, 1, 1, 1000, 2100, 64),
        4,
        kv_heads=2,
        group=4,
        dim=dim,
        dtype=torch.bfloat16,
        key_dtype=key_dtype,
        value_dtype=key_dtype,
    )
    step = make_step(shape, device)
    for window in (None, 1024):
        step.assert_equal_to_twin(window)
