"""The Triton backend: its cache, its place among the backends, and whole models that run on it. On a GPU if there is one, else in Triton's
interpreter."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import (
    FusedAttentionBackend,
    HeadNorms,
    KVCache,
    KVCacheSpec,
    check_cache,
    get_attention_backend,
)
from penstock.execution.attention.triton_paged import TritonPagedAttention
from penstock.execution.kernels.triton.attention import paged_attention_twin
from penstock.execution.layers.rotary import RopeConfig, RotaryEmbedding, apply_rotary
from penstock.execution.models.registry import load_model
from penstock.testing.checkpoints import ModelType, write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel, make_metadata

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []

FP8 = torch.float8_e4m3fn
BACKEND = TritonPagedAttention()
# Types of keys and values in a model that computes in float32.
CACHES = [(torch.float32, torch.float32), (torch.int8, torch.int8), (FP8, FP8), (torch.float32, FP8)]


def make_spec(dtypes: tuple[torch.dtype, torch.dtype] = CACHES[0], head_dim: int = 32) -> KVCacheSpec:
    return KVCacheSpec(16, 2, head_dim, *dtypes)


@pytest.mark.parametrize("dtypes", CACHES)
def test_what_is_written_is_attended_to(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A decode, a chunk, and two rows of padding, whose slots are negative and whose context is empty."""
    torch.manual_seed(1)
    cache = BACKEND.allocate_kv_cache(12, make_spec(dtypes), DEVICE)
    tables, lengths = [[3, 1], [9], [], []], [21, 12, 0, 0]
    whole = make_metadata(tables[:2], lengths[:2], lengths[:2], 16, DEVICE)
    key, value = torch.randn(2, 33, 2, 32, device=DEVICE)
    BACKEND.write(cache, key, value, whole.slot_mapping)
    before = [tensor.clone() for tensor in cache.tensors]
    BACKEND.write(cache, key[:2], value[:2], torch.tensor([-1, -1], device=DEVICE))
    assert all(torch.equal(now.float(), then.float()) for now, then in zip(cache.tensors, before, strict=True))

    query_lens = [1, 7, 0, 0]
    metadata = make_metadata(tables, lengths, query_lens, 16, DEVICE)
    query = torch.randn(8, 6, 32, device=DEVICE)
    expected = paged_attention_twin(
        query,
        cache.key,
        cache.value,
        cache.key_scales,
        cache.value_scales,
        query_start=metadata.query_start,
        seq_lens=metadata.seq_lens,
        block_tables=metadata.block_tables,
        scale=0.3,
        sliding_window=None,
    )
    for _ in range(2):
        actual = BACKEND.attend(query, cache, metadata, 0.3, None)
        torch.testing.assert_close(actual.double().cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_norms", [False, True])
def test_rotation_is_the_layers(with_norms: bool) -> None:
    """One pass gives what normalising, rotating and writing in steps give, for a view of the projections."""
    torch.manual_seed(2)
    rotary = RotaryEmbedding(RopeConfig(), 32, torch.float32, DEVICE)
    positions = torch.tensor([0, 7, 300], device=DEVICE)
    heads = torch.randn(3, 12, 32, device=DEVICE)[:, 2:]  # 6 query heads and 2 of keys and of values
    norms = HeadNorms(torch.rand(32, device=DEVICE), torch.rand(32, device=DEVICE), 1e-5) if with_norms else None
    slots = torch.tensor([40, -1, 3], device=DEVICE)
    fused, steps = (BACKEND.allocate_kv_cache(3, make_spec(), DEVICE) for _ in range(2))
    actual = BACKEND.rotate_and_write(
        fused, heads, table=rotary.table(512), positions=positions, slot_mapping=slots, norms=norms
    )
    query, key, value = heads[:, :6], heads[:, 6:8], heads[:, 8:]
    if norms is not None:
        query = torch.nn.functional.rms_norm(query, (32,), norms.query, norms.eps)
        key = torch.nn.functional.rms_norm(key, (32,), norms.key, norms.eps)
    cos_sin = rotary(positions)
    BACKEND.write(steps, apply_rotary(key, *cos_sin), value, slots)
    torch.testing.assert_close(actual, apply_rotary(query, *cos_sin), atol=1e-5, rtol=1e-5)
    for now, then in zip(fused.tensors, steps.tensors, strict=True):
        torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Swap:
    source: int
    target: int


@pytest.mark.parametrize("dtypes", CACHES)
def test_blocks_are_copied_and_swapped_whole(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    def random_cache() -> KVCache:
        cache = BACKEND.allocate_kv_cache(6, make_spec(dtypes), DEVICE)
        for tensor in cache.tensors:
            as_bytes(tensor).random_(0, 100)
        return cache

    caches = [random_cache() for _ in range(2)]
    before = [[as_bytes(tensor).clone() for tensor in cache.tensors] for cache in caches]
    BACKEND.copy_blocks(caches, torch.tensor([1, 4], device=DEVICE), torch.tensor([0, 5], device=DEVICE))
    host = [BACKEND.allocate_host_cache(4, make_spec(dtypes), DEVICE) for _ in caches]
    assert all(tensor.device.type == "cpu" for tensor in host[0].tensors)
    BACKEND.swap_out(caches, host, [Swap(2, 0), Swap(5, 3)])
    BACKEND.swap_in(caches, host, [Swap(3, 1), Swap(0, 4)])
    BACKEND.swap_in(caches, host, [])
    for tensor in host[0].tensors:
        as_bytes(tensor).zero_()
    for cache, old in zip(caches, before, strict=True):
        assert len(cache.tensors) == 2 + sum(dtype != torch.float32 for dtype in dtypes)
        for now, then in zip(cache.tensors, old, strict=True):
            assert torch.equal(as_bytes(now), then[[1, 4, 2, 3, 2, 4]])


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("dtypes", CACHES)
def test_bytes_per_block_is_what_a_block_takes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    cache = BACKEND.allocate_kv_cache(10, make_spec(dtypes, 80), DEVICE)
    assert cache.nbytes == 10 * BACKEND.bytes_per_block(make_spec(dtypes, 80))
    assert (cache.num_blocks, cache.block_size) == (10, 16)
    assert not any(as_bytes(tensor).any() for tensor in cache.tensors)


def test_its_place_among_the_backends() -> None:
    backend = get_attention_backend("triton", DEVICE)
    assert isinstance(backend, FusedAttentionBackend)
    assert (backend.name, backend.supports_graphs) == ("triton", True)


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    bf16 = torch.bfloat16
    for dtypes in ((bf16, bf16), (torch.int8, torch.int8), (FP8, FP8), (bf16, FP8), (bf16, torch.int8)):
        assert BACKEND.unsupported(make_spec(dtypes, 128), bf16) is None
    assert BACKEND.unsupported(make_spec((torch.float16, FP8), 256), torch.float16) is None
    with pytest.raises(ConfigError, match=r"triton cannot do .* the arithmetic, bfloat16, .* not in float16; set --kv"):
        check_cache(BACKEND, make_spec((torch.float16, torch.float16)), bf16)
    with pytest.raises(ConfigError, match=r"head size up to 256 that is a multiple of 8, not 320"):
        check_cache(BACKEND, make_spec(head_dim=320), torch.float32)
    with pytest.raises(ConfigError, match=r"not 20"):
        check_cache(BACKEND, make_spec(head_dim=20), torch.float32)
    with pytest.raises(ConfigError, match=r"not in float64"):
        check_cache(BACKEND, make_spec((torch.float64, torch.float64)), torch.float64)


@pytest.mark.parametrize(
    ("model_type", "variant"),
    [
        ("llama", {}),
        ("qwen2", {"num_kv_heads": 1}),
        ("qwen3", {"head_dim": 32}),
        ("mistral", {"sliding_window": 10}),
    ],
)
def test_a_model_computes_the_same_as_with_torch(
    model_type: ModelType, variant: dict[str, Any], tmp_path: Path
) -> None:
    """A prompt in two chunks, the second beside another prompt; then both decode, and one of them beside a chunk."""
    folder = write_tiny_checkpoint(tmp_path, model_type, num_layers=1, **variant)
    tokens = random.Random(4).choices(range(256), k=40)
    steps = [
        {"a": tokens[:18]},
        {"a": tokens[18:23], "b": tokens[30:37]},
        {"a": tokens[23:24], "b": tokens[37:38]},
        {"a": tokens[24:25], "b": tokens[38:40]},
    ]
    logits = []
    for name in ("torch", "triton"):
        config = EngineConfig(device=DEVICE.type, attention_backend=name, dtype="float32")
        loaded = load_model(config, folder, DEVICE, torch.float32, progress=False)
        assert loaded.attention_backend.name == name
        loaded.model.prepare(64)
        model = PagedModel(loaded, num_blocks=8)
        logits.append([model.step(step) for step in steps])
    for expected, actual in zip(*logits, strict=True):
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], atol=1e-4, rtol=0)
