"""Paged attention by the native CPU kernels: straight from the blocks, without gathering.

Keys and values lie in tiles of 16 tokens (kernels/attention.py gives the layout), stored as float32, bfloat16, or int8 with one scale per
token and head. Arithmetic is float32 whatever the type of queries and cache. A token's result is the same to the last bit in
every batch, chunking and number of threads (csrc/attention.h says why).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.core.errors import ConfigError
from penstock.execution.attention.backend import KVCache, KVCacheSpec, Move
from penstock.execution.attention.blocks import copy_blocks, move_blocks, zeroed
from penstock.execution.attention.context import AttentionMetadata
from penstock.execution.kernels.attention import KV_KINDS, TILE_TOKENS, AttentionStruct, KVCacheStruct, attend
from penstock.execution.kernels.native import pointer
from penstock.execution.kernels.rows import RotaryStruct, kv_write

_SCALE_BYTES = 4


class NativePagedAttention:
    """See the module's description."""

    name = "native"
    supports_graphs = False

    def unsupported(self, spec: KVCacheSpec, arithmetic: torch.dtype) -> str | None:
        """See AttentionBackend; queries of any type are converted."""
        if spec.block_size % TILE_TOKENS:
            return f"--block-size {spec.block_size} is not for native kernels, which need a multiple of {TILE_TOKENS}"
        if spec.head_dim % 2:
            return f"native kernels need an even head size, not {spec.head_dim}"
        if spec.key_dtype != spec.value_dtype or spec.key_dtype not in KV_KINDS:
            return f"native kernels have no {_name(spec.key_dtype)} KV cache; set --kv-cache-dtype to float32, bfloat16 or int8"
        return None

    def allocate_kv_cache(self, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """Zeroed memory for one layer. Raises ConfigError for a device, type or size that the kernels do not take."""
        reason = self.unsupported(spec, torch.float32)
        if reason is not None or device.type != "cpu":
            raise ConfigError(f"--attention-backend native: {reason or 'it is for CPUs'}; use auto.")
        tiles = (num_blocks, spec.num_kv_heads, spec.block_size // TILE_TOKENS)
        key = zeroed((*tiles, spec.head_dim, TILE_TOKENS), spec.key_dtype, device)
        value = zeroed((*tiles, TILE_TOKENS, spec.head_dim), spec.value_dtype, device)
        if spec.key_dtype != torch.int8:
            return KVCache(key, value)
        scales = (num_blocks, spec.num_kv_heads, spec.block_size)
        return KVCache(key, value, zeroed(scales, torch.float32, device), zeroed(scales, torch.float32, device))

    def allocate_host_cache(self, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> KVCache:
        return self.allocate_kv_cache(num_blocks, spec, device)

    def bytes_per_block(self, spec: KVCacheSpec) -> int:
        scale_bytes = _SCALE_BYTES if spec.key_dtype == torch.int8 else 0
        return 2 * spec.block_size * spec.num_kv_heads * (spec.head_dim * spec.key_dtype.itemsize + scale_bytes)

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        key, value = _float_rows(key), _float_rows(value)
        num_kv_heads, head_dim = key.shape[1:]
        call = RotaryStruct(
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=kv_cache.block_size,
            slot_mapping=slot_mapping.data_ptr(),
            kv_kind=KV_KINDS[kv_cache.key.dtype],
            cache=cache_struct(kv_cache),
        )
        kv_write(call, key, value)

    def attend(
        self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, scale: float, sliding_window: int | None
    ) -> Tensor:
        rows = _float_rows(query)
        output = torch.empty(query.shape, dtype=torch.float32)
        call: AttentionStruct | None = metadata.plan.get(AttentionStruct)
        if call is None:
            call = _start_call(metadata, kv_cache, query)
            metadata.plan[AttentionStruct] = call
        call.query, call.query_stride = rows.data_ptr(), rows.stride(0)
        call.output = output.data_ptr()
        call.scale, call.sliding_window = scale, sliding_window or 0
        call.kv_kind, call.cache = KV_KINDS[kv_cache.key.dtype], cache_struct(kv_cache)
        attend(call)
        return output.to(query.dtype)

    def copy_blocks(self, kv_caches: Sequence[KVCache], source: Tensor, target: Tensor) -> None:
        copy_blocks(kv_caches, source, target)

    def swap_out(self, kv_caches: Sequence[KVCache], host_caches: Sequence[KVCache], moves: Sequence[Move]) -> None:
        move_blocks(kv_caches, host_caches, moves)

    def swap_in(self, kv_caches: Sequence[KVCache], host_caches: Sequence[KVCache], moves: Sequence[Move]) -> None:
        move_blocks(host_caches, kv_caches, moves)


def cache_struct(kv_cache: KVCache) -> KVCacheStruct:
    """The cache as C++ sees it. Valid as long as `kv_cache`."""
    return KVCacheStruct(
        kv_cache.key.data_ptr(),
        kv_cache.value.data_ptr(),
        pointer(kv_cache.key_scales),
        pointer(kv_cache.value_scales),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _float_rows(x: Tensor) -> Tensor:
    """[T, heads, D] in float32, contiguous within a token."""
    x = x.to(torch.float32)
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _start_call(metadata: AttentionMetadata, kv_cache: KVCache, query: Tensor) -> AttentionStruct:
    """What is the same for all layers of a step."""
    num_tokens, num_heads, head_dim = query.shape
    return AttentionStruct(
        output_stride=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=kv_cache.key.shape[1],
        head_dim=head_dim,
        block_size=kv_cache.block_size,
        num_requests=metadata.num_requests,
        num_tokens=num_tokens,
        query_start=metadata.query_start.data_ptr(),
        seq_lens=metadata.seq_lens.data_ptr(),
        block_tables=metadata.block_tables.data_ptr(),
        block_table_stride=metadata.block_tables.stride(0),
    )
