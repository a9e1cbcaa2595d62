"""How many KV blocks there are.

    free memory before the weights ┤ share that is ours (memory_utilization) ├ the rest of the machine
                                   [ weights, buffers | a full step | CUDA graphs | KV cache ]

but never more than KV_CAP_FACTOR times what max_num_seqs requests of full length need: those can all run at once, and as much again
holds prefixes for reuse. Who wants more says so with --kv-cache-gib, which is taken as it is.
On a CPU the memory is reserved but not touched until a block is used, so the process grows with its load, and what a step takes is
estimated. On a GPU everything before the cache is measured: see device_start.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import AttentionBackend, KVCache, KVCacheSpec
from penstock.execution.models.config import ModelConfig
from penstock.execution.runner.out_of_memory import mib

GIB = 2**30
KV_CAP_FACTOR = 2
# A cache that cannot hold one request of this many tokens (or of the model's whole context, if that is shorter) serves nobody.
MIN_REQUEST_TOKENS = 64
# cgroup v2 and v1: limit and usage of this process's container.
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


@dataclass(frozen=True)
class KVPlan:
    """Blocks to allocate on the device and in the host tier, and the size of one across all layers."""

    num_blocks: int
    num_host_blocks: int
    bytes_per_block: int


@dataclass(frozen=True)
class MemoryUse:
    """What is spoken for before there is a KV cache, in bytes.

    free_bytes: free on the device before the weights were loaded. weight_bytes: what weights, and buffers that stay, have taken of it.
    step_bytes: what a full step takes for its time. graph_bytes: what CUDA graphs will take.
    measured: whether these were measured, on a GPU; elsewhere a step is estimated from above.
    """

    free_bytes: int
    weight_bytes: int
    step_bytes: int
    graph_bytes: int = 0
    measured: bool = False


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now; on a CPU within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_memory()


def free_host_memory() -> int:
    """Bytes of main memory that this process can still take, without page cache counted as used."""
    free = int(psutil.virtual_memory().available)
    for limit_file, usage_file, stat_file in _CGROUP_FILES:
        limit = Path(limit_file)
        if not limit.is_file():
            continue
        text = limit.read_text().strip()
        if text != "max":
            used = int(Path(usage_file).read_text()) - _reclaimable(Path(stat_file))
            free = min(free, max(0, int(text) - used))
        break
    return free


def _reclaimable(stat_file: Path) -> int:
    for line in stat_file.read_text().splitlines():
        name, value = line.split()
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def activation_bytes(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, max_drafts: int = 0) -> int:
    """An upper estimate of what one full step takes beside weights and cache.

    Per token: the residual and its normalised copy, query, key, value and attention output, the two halves and the product of the MLP, and
    as much again for what an operator holds while it works. Per token that is sampled, one of each request and behind each of its up to
    `max_drafts` drafts: three float32 rows of the vocabulary.
    """
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = 2 * (3 * model.hidden_size + heads + 3 * model.feed_forward_width) * dtype.itemsize
    sampled = max(config.max_num_seqs, min(config.max_num_seqs * (1 + max_drafts), config.max_num_batched_tokens))
    return config.max_num_batched_tokens * per_token + sampled * 3 * model.vocab_size * 4


def plan_kv_memory(config: EngineConfig, bytes_per_block: int, use: MemoryUse, *, free_host_bytes: int) -> KVPlan:
    """Size this rank's part of the cache. `config` is resolved; `bytes_per_block`: what a block takes here, in all layers;
    `free_host_bytes`: what the rank may take of main memory now. Sizes in `config` are those of all ranks together, each of which has an
    even share. Raises ConfigError when no useful request fits, or the host tier does not."""
    block_size, ranks = config.block_size, config.num_ranks
    blocks_per_request = -(-config.max_model_len // block_size)
    wanted = -(-min(config.max_model_len, MIN_REQUEST_TOKENS) // block_size)
    if config.kv_cache_gib:
        room = int(config.kv_cache_gib * GIB / ranks)
        num_blocks = room // bytes_per_block
        fix = f"raise --kv-cache-gib to at least {_gib_up(wanted * bytes_per_block * ranks)}"
        _check_explicit_size(config, room, use)
    else:
        share = int(config.memory_utilization * use.free_bytes)
        room = share - use.weight_bytes - use.step_bytes - use.graph_bytes
        num_blocks = min(room // bytes_per_block, KV_CAP_FACTOR * config.max_num_seqs * blocks_per_request)
        fix = _how_to_get_room(config, use)
    if num_blocks < wanted:
        raise ConfigError(
            f"The KV cache needs at least {mib(wanted * bytes_per_block)} for one request but has {mib(max(0, room))}; {fix}."
        )
    num_host_blocks = int(config.swap_space_gib * GIB / ranks) // bytes_per_block
    if num_host_blocks * bytes_per_block > free_host_bytes:
        raise ConfigError(
            f"--swap-space-gib {config.swap_space_gib:g} is {mib(num_host_blocks * bytes_per_block)}{_each(ranks)} but "
            f"{mib(free_host_bytes)} of main memory are free; lower it."
        )
    return KVPlan(num_blocks, num_host_blocks, bytes_per_block)


def _each(ranks: int) -> str:
    return f" for each of {ranks} ranks" if ranks > 1 else ""


def _check_explicit_size(config: EngineConfig, room: int, use: MemoryUse) -> None:
    """What was measured has to fit beside a cache of an explicit size; an estimate from above does not."""
    free = use.free_bytes - use.weight_bytes
    beside = "the weights"
    if use.measured:
        free -= use.step_bytes + use.graph_bytes
        beside = "weights, a full step and CUDA graphs"
    if room > free:
        raise ConfigError(
            f"--kv-cache-gib {config.kv_cache_gib:g} is {mib(room)}{_each(config.num_ranks)} but {mib(max(0, free))} are free beside "
            f"{beside}; lower it."
        )


def _how_to_get_room(config: EngineConfig, use: MemoryUse) -> str:
    if not use.measured:
        return "raise --memory-utilization, lower --max-num-batched-tokens, or take a smaller model"
    return (
        f"of {mib(use.free_bytes)} free, --memory-utilization {config.memory_utilization:g} gives us "
        f"{mib(int(config.memory_utilization * use.free_bytes))}, of which weights and buffers take {mib(use.weight_bytes)}, "
        f"a full step {mib(use.step_bytes)} and CUDA graphs {mib(use.graph_bytes)}: raise it, lower --max-num-batched-tokens, "
        "--max-num-seqs or --cuda-graph-max-batch-size, or take fewer bits a weight (--quantization int8, int4 or fp8) or a smaller model"
    )


def allocate_kv_caches(
    plan: KVPlan, spec: KVCacheSpec, num_layers: int, backend: AttentionBackend, device: torch.device
) -> tuple[list[KVCache], list[KVCache]]:
    """KV caches of the device and, if there is a host tier, of the host: one per layer each."""
    device_caches = [backend.allocate_kv_cache(plan.num_blocks, spec, device) for _ in range(num_layers)]
    if not plan.num_host_blocks:
        return device_caches, []
    return device_caches, [backend.allocate_host_cache(plan.num_host_blocks, spec, device) for _ in range(num_layers)]


def _gib_up(size: int) -> str:
    """`size` in GiB, rounded up to what reads well and still suffices."""
    return f"{(size + GIB // 10_000) / GIB:.4f}"
