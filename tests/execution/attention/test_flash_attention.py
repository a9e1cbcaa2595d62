"""FlashAttention's backend over stand-ins for its packages: what is handed to them, and that attention comes out."""

from __future__ import annotations

import sys

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import KVCacheSpec
from penstock.execution.attention.flash_attention import FlashAttention, FlashLibrary, installed_library
from tests.execution.attention.package_doubles import FlashDouble
from tests.execution.attention.paged_steps import CPU, PagedStep, make_paged_step, written_out

# Requests that decode first, then prefill chunks with and without context before them.
STEPS = {
    "decodes": ([37, 1, 300], [1, 1, 1]),
    "prefills": ([20, 41, 270], [20, 7, 3]),
    "mixed": ([5, 260, 30, 33], [1, 1, 30, 4]),
}


def make_backend(generation: int) -> tuple[FlashAttention, FlashDouble]:
    double = FlashDouble(generation)
    return FlashAttention(FlashLibrary(generation, f"generation {generation}", double.module)), double


def make_step(name: str, generation: int, num_kv_heads: int = 2) -> PagedStep:
    return make_paged_step(*STEPS[name], num_kv_heads=num_kv_heads, block_size=256 if generation == 2 else 16)


@pytest.mark.parametrize("generation", [2, 3])
@pytest.mark.parametrize("sliding_window", [None, 1, 24])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("name", STEPS)
def test_attend_equals_attention_written_out(
    name: str, num_kv_heads: int, sliding_window: int | None, generation: int
) -> None:
    step = make_step(name, generation, num_kv_heads)
    backend, _ = make_backend(generation)
    actual = backend.attend(step.query, step.cache, step.metadata, 0.1, sliding_window)
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.double(), written_out(step, 0.1, sliding_window), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("generation", "name", "calls"),
    [
        (2, "decodes", [("kvcache", 3)]),
        (2, "prefills", [("varlen", 3)]),
        (2, "mixed", [("kvcache", 2), ("varlen", 2)]),
        (3, "decodes", [("kvcache", 3)]),
        (3, "prefills", [("kvcache varlen", 3)]),
        (3, "mixed", [("kvcache varlen", 4)]),
    ],
)
def test_each_generation_is_called_as_it_is_fastest(generation: int, name: str, calls: list[tuple[str, int]]) -> None:
    step = make_step(name, generation)
    backend, double = make_backend(generation)
    backend.attend(step.query, step.cache, step.metadata, 0.1, None)
    assert double.calls == calls


@pytest.mark.parametrize("generation", [2, 3])
def test_a_decode_follows_its_buffers(generation: int) -> None:
    """What a CUDA graph relies on: the same metadata object, with other numbers in its tensors, gives the other result."""
    step = make_paged_step([100, 90], [1, 1], block_size=256 if generation == 2 else 16)
    backend, _ = make_backend(generation)
    backend.attend(step.query, step.cache, step.metadata, 0.1, None)
    step.metadata.seq_lens[0] = 3
    step.keys[0], step.values[0] = step.keys[0][:3], step.values[0][:3]
    actual = backend.attend(step.query, step.cache, step.metadata, 0.1, None)
    torch.testing.assert_close(actual.double(), written_out(step, 0.1, None), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("generation", [2, 3])
def test_a_request_without_tokens_gives_zeros(generation: int) -> None:
    step = make_paged_step([40, 9], [1, 1], block_size=256 if generation == 2 else 16)
    step.metadata.seq_lens[1] = 0
    backend, _ = make_backend(generation)
    actual = backend.attend(step.query, step.cache, step.metadata, 0.1, None)
    assert not actual[1].any()
    assert actual[0].any()


@pytest.mark.parametrize("generation", [2, 3])
def test_reads_what_it_has_written(generation: int) -> None:
    """Writes are those of the Triton kernels, into a cache that this backend allocates."""
    step = make_paged_step([12, 9], [12, 9], block_size=256 if generation == 2 else 16)
    backend, _ = make_backend(generation)
    block_size = step.cache.block_size
    cache = backend.allocate_kv_cache(step.cache.num_blocks, spec(block_size, 64, torch.float16), CPU)
    backend.write(cache, torch.cat(step.keys), torch.cat(step.values), step.metadata.slot_mapping)
    actual = backend.attend(step.query, cache, step.metadata, 0.1, None)
    torch.testing.assert_close(actual.double(), written_out(step, 0.1, None), atol=2e-3, rtol=2e-3)


def spec(block_size: int = 256, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> KVCacheSpec:
    return KVCacheSpec(block_size, 2, head_dim, dtype, dtype)


@pytest.mark.parametrize(
    ("generation", "cache", "arithmetic", "reason"),
    [
        (2, spec(), torch.bfloat16, None),
        (2, spec(block_size=16), torch.bfloat16, "blocks of a multiple of 256 tokens, not of 16"),
        (3, spec(block_size=16), torch.bfloat16, None),
        (3, spec(block_size=48, head_dim=96), torch.bfloat16, None),
        (3, spec(), torch.float32, "computes in float16 or bfloat16, not in float32"),
        (3, spec(dtype=torch.int8), torch.bfloat16, "in the type of queries, bfloat16, not in int8"),
        (3, spec(dtype=torch.float8_e4m3fn), torch.float16, "not in float8_e4m3fn"),
        (3, KVCacheSpec(16, 8, 128, torch.bfloat16, torch.int8), torch.bfloat16, "not in int8"),
        (3, spec(head_dim=320), torch.bfloat16, "heads of up to 256"),
        (2, spec(head_dim=100), torch.bfloat16, "multiples of 8, not of 100"),
    ],
)
def test_says_what_it_cannot_do(
    generation: int, cache: KVCacheSpec, arithmetic: torch.dtype, reason: str | None
) -> None:
    backend, _ = make_backend(generation)
    actual = backend.unsupported(cache, arithmetic)
    if reason is None:
        assert actual is None
    else:
        assert actual is not None
        assert reason in actual


def install(monkeypatch: pytest.MonkeyPatch, *doubles: FlashDouble, capability: tuple[int, int]) -> None:
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    for double in doubles:
        monkeypatch.setitem(sys.modules, double.module.__name__, double.module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def test_the_third_generation_goes_first_on_hopper_only(monkeypatch: pytest.MonkeyPatch) -> None:
    both = FlashDouble(2), FlashDouble(3)
    install(monkeypatch, *both, capability=(9, 0))
    assert installed_library().generation == 3
    install(monkeypatch, *both, capability=(8, 0))
    assert (installed_library().generation, installed_library().name) == (2, "flash-attn 2.8.3")
    install(monkeypatch, both[0], capability=(9, 0))
    assert installed_library().generation == 2


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, capability=(9, 0))
    with pytest.raises(ConfigError, match="flash-attn is not installed; install it or use auto"):
        installed_library()
    install(monkeypatch, FlashDouble(3), capability=(8, 0))
    with pytest.raises(ConfigError, match="flash_attn_3 runs on Hopper GPUs only"):
        installed_library()
    install(monkeypatch, FlashDouble(2, version="2.5.9"), capability=(8, 0))
    with pytest.raises(ConfigError, match=r"flash-attn 2\.5\.9 is too old; 2\.6 is needed"):
        installed_library()
