import dataclasses
from pathlib import Path

import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import KVCacheSpec, cache_spec
from penstock.execution.attention.native_paged import NativePagedAttention
from penstock.execution.kernels.native import native_available
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner import kv_memory
from penstock.execution.runner.kv_memory import (
    GIB,
    KV_CAP_FACTOR,
    KVPlan,
    MemoryUse,
    activation_bytes,
    allocate_kv_caches,
    plan_kv_memory,
)

# Two layers of 2 heads of 16 float32 numbers, keys and values, 16 tokens.
BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16
CONFIG = EngineConfig(
    memory_utilization=0.5,
    max_num_batched_tokens=64,
    max_num_seqs=8,
    max_model_len=512,
)


def _spec(loaded: LoadedModel, config: EngineConfig) -> KVCacheSpec:
    model = loaded.config
    return cache_spec(
        config.kv_cache_dtype,
        torch.float32,
        block_size=config.block_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
    )


def _plan(
    loaded: LoadedModel, config: EngineConfig, *, free: int = GIB, weights: int = 0, use: MemoryUse | None = None
) -> KVPlan:
    return plan_kv_memory(
        config,
        loaded.config.num_layers * loaded.attention_backend.bytes_per_block(_spec(loaded, config)),
        use or MemoryUse(free, weights, activation_bytes(config, loaded.config, torch.float32)),
        free_host_bytes=GIB,
    )


def test_takes_its_share_of_what_weights_and_activations_leave(loaded: LoadedModel) -> None:
    activations = activation_bytes(CONFIG, loaded.config, torch.float32)
    free = 2 * (activations + 1000 + 30 * BLOCK_BYTES)
    plan = _plan(loaded, CONFIG, free=free, weights=1000)
    assert plan == KVPlan(num_blocks=30, num_host_blocks=0, bytes_per_block=BLOCK_BYTES)
    assert _plan(loaded, CONFIG, free=free, weights=1001).num_blocks == 29


def test_rows_of_drafts_count_as_far_as_a_step_has_tokens(loaded: LoadedModel) -> None:
    config = dataclasses.replace(CONFIG, max_num_seqs=4, max_num_batched_tokens=10)
    row = 3 * loaded.config.vocab_size * 4
    plain = activation_bytes(config, loaded.config, torch.float32)
    assert activation_bytes(config, loaded.config, torch.float32, 1) == plain + 4 * row
    assert activation_bytes(config, loaded.config, torch.float32, 5) == plain + 6 * row


def test_on_a_gpu_what_was_measured_comes_off(loaded: LoadedModel) -> None:
    use = MemoryUse(2 * (600 + 30 + 7 + 5 * BLOCK_BYTES), 600, 30, 7, measured=True)
    assert _plan(loaded, CONFIG, use=use).num_blocks == 5
    for more in (
        dataclasses.replace(use, weight_bytes=601),
        dataclasses.replace(use, step_bytes=31),
        dataclasses.replace(use, graph_bytes=8),
    ):
        assert _plan(loaded, CONFIG, use=more).num_blocks == 4


def test_on_a_gpu_errors_say_where_the_memory_went(loaded: LoadedModel) -> None:
    mib = 2**20
    use = MemoryUse(1000 * mib, 300 * mib, 150 * mib, 50 * mib, measured=True)
    with pytest.raises(ConfigError) as caught:
        _plan(loaded, CONFIG, use=use)
    text = str(caught.value)
    for words in (
        "has 0.0 MiB; of 1,000.0 MiB free, --memory-utilization 0.5 gives us 500.0 MiB",
        "weights and buffers take 300.0 MiB, a full step 150.0 MiB and CUDA graphs 50.0 MiB",
        "--max-num-batched-tokens, --max-num-seqs or --cuda-graph-max-batch-size",
        "--quantization int8, int4 or fp8",
    ):
        assert words in text
    explicit = dataclasses.replace(CONFIG, kv_cache_gib=0.5)
    with pytest.raises(
        ConfigError, match=r"512\.0 MiB but 500\.0 MiB are free beside weights, a full step and CUDA graphs"
    ):
        _plan(loaded, explicit, use=use)
    assert _plan(loaded, explicit, use=dataclasses.replace(use, step_bytes=0)).num_blocks == 512 * mib // BLOCK_BYTES


def test_never_more_than_all_requests_can_use(loaded: LoadedModel) -> None:
    assert _plan(loaded, CONFIG).num_blocks == KV_CAP_FACTOR * 8 * 32


def test_an_explicit_size_is_taken_as_it_is(loaded: LoadedModel) -> None:
    config = dataclasses.replace(CONFIG, kv_cache_gib=7.5 * BLOCK_BYTES / GIB, swap_space_gib=3.9 * BLOCK_BYTES / GIB)
    assert _plan(loaded, config) == KVPlan(num_blocks=7, num_host_blocks=3, bytes_per_block=BLOCK_BYTES)
    more_than_running_requests_need = dataclasses.replace(CONFIG, kv_cache_gib=0.5)
    assert _plan(loaded, more_than_running_requests_need).num_blocks == GIB // 2 // BLOCK_BYTES


def test_errors_name_both_numbers_and_the_fix(loaded: LoadedModel) -> None:
    tiny = dataclasses.replace(CONFIG, kv_cache_gib=3 * BLOCK_BYTES / GIB)
    with pytest.raises(ConfigError, match=r"at least 0\.0 MiB .* raise --kv-cache-gib to at least 0\.0001\.") as caught:
        _plan(loaded, tiny)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"needs at least .* but has 0\.0 MiB; raise --memory-utilization"):
        _plan(loaded, CONFIG, free=1000)
    with pytest.raises(ConfigError, match=r"--kv-cache-gib 2 is 2,048\.0 MiB but 1,024\.0 MiB are free"):
        _plan(loaded, dataclasses.replace(CONFIG, kv_cache_gib=2))
    with pytest.raises(ConfigError, match=r"--swap-space-gib 2 is 2,048\.0 MiB but 1,024\.0 MiB of main memory"):
        _plan(loaded, dataclasses.replace(CONFIG, swap_space_gib=2))


def test_sizes_are_those_of_all_ranks_together(loaded: LoadedModel) -> None:
    config = dataclasses.replace(
        CONFIG,
        tensor_parallel_size=2,
        kv_cache_gib=14.5 * BLOCK_BYTES / GIB,
        swap_space_gib=7 * BLOCK_BYTES / GIB,
    )
    assert _plan(loaded, config) == KVPlan(num_blocks=7, num_host_blocks=3, bytes_per_block=BLOCK_BYTES)
    with pytest.raises(
        ConfigError, match=r"--kv-cache-gib 4 is 2,048\.0 MiB for each of 2 ranks but 1,024\.0 MiB are free"
    ):
        _plan(loaded, dataclasses.replace(config, kv_cache_gib=4))


def test_a_short_context_needs_no_more_than_itself(loaded: LoadedModel) -> None:
    config = dataclasses.replace(CONFIG, max_model_len=20, kv_cache_gib=2 * BLOCK_BYTES / GIB)
    assert _plan(loaded, config).num_blocks == 2


@pytest.mark.parametrize(("limit", "expected"), [("max", None), (str(3 * 2**20), 2**20 + 2**19)])
def test_a_containers_limit_counts(
    limit: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("memory.max", "memory.current", "memory.stat")]
    for file, text in zip(files, (limit, str(2 * 2**20), f"anon 5\ninactive_file {2**19}\n"), strict=True):
        file.write_text(text)
    monkeypatch.setattr(kv_memory, "_CGROUP_FILES", (tuple(str(file) for file in files),))
    free = kv_memory.free_host_memory()
    if expected is None:
        assert free > 2**22
    else:
        assert free == expected


@pytest.mark.skipif(not native_available(), reason="no native kernels")
def test_the_caches_type_decides_its_size(loaded: LoadedModel) -> None:
    """Two layers of 2 heads of 16 numbers, keys and values; int8 has a float32 scale for each."""
    numbers = 2 * 2 * 2 * 16 * 16
    native = dataclasses.replace(loaded, attention_backend=NativePagedAttention())
    for name, size in (("float32", 4 * numbers), ("bfloat16", 2 * numbers), ("int8", numbers + numbers // 16 * 4)):
        config = dataclasses.replace(CONFIG, kv_cache_dtype=name)
        plan = _plan(native, config)
        assert plan.bytes_per_block == size
        caches, host = allocate_kv_caches(
            KVPlan(3, 2, size),
            _spec(loaded, config),
            loaded.config.num_layers,
            native.attention_backend,
            torch.device("cpu"),
        )
        assert sum(cache.nbytes for cache in caches) == 3 * size
        assert sum(cache.nbytes for cache in host) == 2 * size
        assert {cache.key.dtype for cache in caches} == {getattr(torch, name)}
