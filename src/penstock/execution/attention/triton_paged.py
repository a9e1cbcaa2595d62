"""Paged attention by Triton kernels, for NVIDIA GPUs: straight from the blocks, without gathering.

Layout of one layer's keys (and values): [num_blocks, block_size, KVH, D]. Keys and values have the type of queries, or are rounded to int8
or float8_e4m3fn with a float32 scale per token and head, [num_blocks, block_size, KVH]; keys may stay in the type of queries while
values are rounded.

Nothing is decided by numbers on the host but by shapes and by the longest query, so that a step of decodes, or of requests with a few
tokens each, can be recorded and replayed. A decode's result does not depend on what other requests are; how many they are
changes into how many parts its context is cut, and with that the last bits of the sum (kernels/triton/attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.execution.attention.backend import HeadNorms, KVCache, KVCacheSpec, Move
from penstock.execution.attention.blocks import copy_blocks, host_zeroed, move_blocks, zeroed
from penstock.execution.attention.context import AttentionMetadata
from penstock.execution.kernels.triton import cache_write
from penstock.execution.kernels.triton.attention import MAX_HEAD_DIM, ROUNDED_DTYPES, paged_attention

_ARITHMETIC = (torch.bfloat16, torch.float16, torch.float32)
_SCALE_BYTES = 4
# A row of a head is read in pieces of this many numbers.
_HEAD_DIM_MULTIPLE = 8


class TritonPagedAttention:
    """See the module's description."""

    name = "triton"
    supports_graphs = True

    def unsupported(self, spec: KVCacheSpec, arithmetic: torch.dtype) -> str | None:
        """See AttentionBackend."""
        if arithmetic not in _ARITHMETIC:
            return f"Triton kernels compute in bfloat16, float16 or float32, not in {_name(arithmetic)}"
        if spec.head_dim % _HEAD_DIM_MULTIPLE or spec.head_dim > MAX_HEAD_DIM:
            return f"Triton kernels need a head size up to {MAX_HEAD_DIM} that is a multiple of {_HEAD_DIM_MULTIPLE}, not {spec.head_dim}"
        for dtype in (spec.key_dtype, spec.value_dtype):
            if dtype != arithmetic and dtype not in ROUNDED_DTYPES:
                return (
                    f"Triton kernels keep keys and values in the type of the arithmetic, {_name(arithmetic)}, or in 8 bits, not in "
                    f"{_name(dtype)}; set --kv-cache-dtype to auto, int8 or fp8"
                )
        return None

    def allocate_kv_cache(self, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> KVCache:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        key, value = (zeroed(shape, dtype, device) for dtype in (spec.key_dtype, spec.value_dtype))
        scales = [zeroed(shape[:3], torch.float32, device) if x.dtype in ROUNDED_DTYPES else None for x in (key, value)]
        return KVCache(key, value, *scales)

    def allocate_host_cache(self, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> KVCache:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        key, value = (host_zeroed(shape, dtype, device) for dtype in (spec.key_dtype, spec.value_dtype))
        scales = [
            host_zeroed(shape[:3], torch.float32, device) if x.dtype in ROUNDED_DTYPES else None for x in (key, value)
        ]
        return KVCache(key, value, *scales)

    def bytes_per_block(self, spec: KVCacheSpec) -> int:
        row_bytes = sum(
            spec.head_dim * dtype.itemsize + (_SCALE_BYTES if dtype in ROUNDED_DTYPES else 0)
            for dtype in (spec.key_dtype, spec.value_dtype)
        )
        return spec.block_size * spec.num_kv_heads * row_bytes

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """See AttentionBackend; a token with a negative slot is not written."""
        cache_write.write(
            _rows(key),
            _rows(value),
            kv_cache.key,
            kv_cache.value,
            kv_cache.key_scales,
            kv_cache.value_scales,
            slot_mapping,
        )

    def rotate_and_write(
        self,
        kv_cache: KVCache,
        heads: Tensor,
        *,
        table: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        norms: HeadNorms | None,
    ) -> Tensor:
        """See FusedAttentionBackend; a token with a negative slot is not written."""
        return cache_write.rotate_and_write(
            _rows(heads),
            kv_cache.key,
            kv_cache.value,
            kv_cache.key_scales,
            kv_cache.value_scales,
            table=table,
            positions=positions,
            slot_mapping=slot_mapping,
            q_norm=None if norms is None else norms.query,
            k_norm=None if norms is None else norms.key,
            eps=0.0 if norms is None else norms.eps,
        )

    def attend(
        self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, scale: float, sliding_window: int | None
    ) -> Tensor:
        max_query_len = metadata.plan.get(TritonPagedAttention)
        if max_query_len is None:
            starts = metadata.query_start_host[metadata.num_decodes :]
            max_query_len = int((starts[1:] - starts[:-1]).max(initial=0))
            metadata.plan[TritonPagedAttention] = max_query_len
        return paged_attention(
            _rows(query),
            kv_cache.key,
            kv_cache.value,
            kv_cache.key_scales,
            kv_cache.value_scales,
            query_start=metadata.query_start,
            seq_lens=metadata.seq_lens,
            block_tables=metadata.block_tables,
            num_decodes=metadata.num_decodes,
            max_query_len=max_query_len,
            scale=scale,
            sliding_window=sliding_window,
        )

    def copy_blocks(self, kv_caches: Sequence[KVCache], source: Tensor, target: Tensor) -> None:
        copy_blocks(kv_caches, source, target)

    def swap_out(self, kv_caches: Sequence[KVCache], host_caches: Sequence[KVCache], moves: Sequence[Move]) -> None:
        move_blocks(kv_caches, host_caches, moves)

    def swap_in(self, kv_caches: Sequence[KVCache], host_caches: Sequence[KVCache], moves: Sequence[Move]) -> None:
        move_blocks(host_caches, kv_caches, moves)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(heads: Tensor) -> Tensor:
    """[T, heads, D], contiguous within a token."""
    return heads if heads.stride(2) == 1 and heads.stride(1) == heads.shape[2] else heads.contiguous()
