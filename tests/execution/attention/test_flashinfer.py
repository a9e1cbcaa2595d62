"""FlashInfer's backend over a stand-in for the package: plans, pages, windows, and that attention comes out."""

from __future__ import annotations

import sys

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import KVCacheSpec
from penstock.execution.attention.flashinfer import FlashInferAttention, installed_library
from tests.execution.attention.package_doubles import FlashInferDouble
from tests.execution.attention.paged_steps import CPU, make_paged_step, written_out

SCALE = 0.1


def make_backend() -> tuple[FlashInferAttention, FlashInferDouble]:
    double = FlashInferDouble()
    return FlashInferAttention(double.module), double


@pytest.mark.parametrize("block_size", [16, 24])
@pytest.mark.parametrize("sliding_window", [None, 1, 20])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [
        ([48], [1]),
        ([37, 1, 96], [1, 1, 1]),
        ([20, 41, 64], [20, 7, 3]),
        ([5, 49, 30, 33], [1, 1, 30, 4]),
    ],
)
def test_attend_equals_attention_written_out(
    seq_lens: list[int], query_lens: list[int], num_kv_heads: int, sliding_window: int | None, block_size: int
) -> None:
    step = make_paged_step(seq_lens, query_lens, num_kv_heads=num_kv_heads, block_size=block_size)
    backend, _ = make_backend()
    actual = backend.attend(step.query, step.cache, step.metadata, SCALE, sliding_window)
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.double(), written_out(step, SCALE, sliding_window), atol=2e-3, rtol=2e-3)


def test_a_step_is_planned_once_for_all_layers_with_one_window() -> None:
    step = make_paged_step([5, 49, 30], [1, 1, 12])
    backend, double = make_backend()
    for sliding_window in (None, 10, None, 10, None):
        actual = backend.attend(step.query, step.cache, step.metadata, SCALE, sliding_window)
        torch.testing.assert_close(actual.double(), written_out(step, SCALE, sliding_window), atol=2e-3, rtol=2e-3)
    assert double.plans == 4  # decodes and prefills, with and without the window


def test_steps_may_take_turns() -> None:
    """A wrapper keeps one plan: coming back to a step plans it anew instead of running the other's."""
    steps = [make_paged_step([17, 40], [1, 1], seed=1), make_paged_step([33, 50, 9], [1, 1, 9], seed=2)]
    backend, _ = make_backend()
    for step in (steps[0], steps[1], steps[0], steps[0], steps[1]):
        actual = backend.attend(step.query, step.cache, step.metadata, SCALE, None)
        torch.testing.assert_close(actual.double(), written_out(step, SCALE, None), atol=2e-3, rtol=2e-3)


def test_a_metadata_object_may_be_filled_anew() -> None:
    """As long as its plan is cleared with it."""
    backend, _ = make_backend()
    first, second = make_paged_step([17, 40], [1, 1], seed=1), make_paged_step([90, 3], [1, 1], seed=2)
    backend.attend(first.query, first.cache, first.metadata, SCALE, None)
    metadata = first.metadata
    for name in ("seq_lens", "seq_lens_host", "block_tables", "max_seq_len"):
        setattr(metadata, name, getattr(second.metadata, name))
    metadata.plan.clear()
    actual = backend.attend(second.query, second.cache, metadata, SCALE, None)
    torch.testing.assert_close(actual.double(), written_out(second, SCALE, None), atol=2e-3, rtol=2e-3)


def test_a_request_without_tokens_gives_zeros() -> None:
    step = make_paged_step([40, 20, 18, 1], [1, 1, 1, 1])
    for request in (1, 3):
        step.metadata.seq_lens_host[request] = 0
        step.metadata.seq_lens[request] = 0
        step.keys[request], step.values[request] = step.keys[request][:0], step.values[request][:0]
    backend, _ = make_backend()
    actual = backend.attend(step.query, step.cache, step.metadata, SCALE, None)
    torch.testing.assert_close(actual.double(), written_out(step, SCALE, None), atol=2e-3, rtol=2e-3)
    assert not actual[[1, 3]].any()


def test_reads_what_it_has_written() -> None:
    """Writes are those of the Triton kernels, into a cache that this backend allocates."""
    step = make_paged_step([37, 20], [37, 20])
    backend, _ = make_backend()
    cache = backend.allocate_kv_cache(step.cache.num_blocks, spec(torch.float16, head_dim=64), CPU)
    backend.write(cache, torch.cat(step.keys), torch.cat(step.values), step.metadata.slot_mapping)
    actual = backend.attend(step.query, cache, step.metadata, SCALE, 8)
    torch.testing.assert_close(actual.double(), written_out(step, SCALE, 8), atol=2e-3, rtol=2e-3)


def spec(dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> KVCacheSpec:
    return KVCacheSpec(16, 2, head_dim, dtype, dtype)


@pytest.mark.parametrize(
    ("cache", "arithmetic", "reason"),
    [
        (spec(), torch.bfloat16, None),
        (spec(torch.float16, head_dim=64), torch.float16, None),
        (spec(torch.float32), torch.float32, "computes in float16 or bfloat16, not in float32"),
        (spec(torch.float8_e4m3fn), torch.bfloat16, "one scale for all float8_e4m3fn keys or values"),
        (KVCacheSpec(16, 8, 128, torch.bfloat16, torch.int8), torch.bfloat16, "one scale for all int8"),
        (spec(torch.float16), torch.bfloat16, "in the type of queries, bfloat16, not in float16"),
        (spec(head_dim=80), torch.bfloat16, "heads of 64, 128, 256 numbers, not of 80"),
    ],
)
def test_says_what_it_cannot_do(cache: KVCacheSpec, arithmetic: torch.dtype, reason: str | None) -> None:
    actual = make_backend()[0].unsupported(cache, arithmetic)
    if reason is None:
        assert actual is None
    else:
        assert actual is not None
        assert reason in actual


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match="flashinfer-python is not installed; install it or use auto"):
        installed_library()
    monkeypatch.setitem(sys.modules, "flashinfer", FlashInferDouble(version="0.1.6").module)
    with pytest.raises(ConfigError, match=r"flashinfer-python 0\.1\.6 is too old; 0\.2 is needed"):
        installed_library()
    double = FlashInferDouble()
    monkeypatch.setitem(sys.modules, "flashinfer", double.module)
    assert installed_library() is double.module
