"""Paged attention in plain torch operators: the reference for every other backend, for CPUs and GPUs alike.

Layout of one layer's keys (and values): [num_blocks, block_size, KVH, D], so that a slot is a row.

Decodes: the contexts of many requests are gathered into one padded batch and attended to in one call. Requests of similar length
share a batch, so that one long context does not pad all the others. The query heads of one KV head are laid along
the query dimension, so that keys and values are not repeated:

    query [R, H, D] → [R, KVH, H / KVH, D]     keys [R, longest, KVH, D] → [R, KVH, longest, D]

Padding stands behind the context and repeats a slot of the same request. Its weight is exactly zero, and since 0 * NaN is NaN, it
must never be memory that another request may have filled.

Prefill chunks: per request, one call for every 1024 query tokens over the context that they see, with a causal mask aligned to
the bottom right. The bound keeps masks small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.attention.backend import KVCache, KVCacheSpec, Move
from penstock.execution.attention.blocks import copy_blocks, host_zeroed, move_blocks, zeroed
from penstock.execution.attention.context import AttentionMetadata

# Contexts up to this many tokens share a batch whatever their lengths: padding them costs less than another call.
_SMALL_CONTEXT = 64

# A decode's result should not depend, to the last bit, on whose contexts it is padded with. Adding zeros changes no sum, but the
# operators choose the order of summation by the padded length: vector lanes of 16 and a rest; pieces of 512, which are cut in two halves
# when they are longer than 384 (measured with AVX-512). So contexts are padded such that every element has the same order in
# every batch; see `padded_length`.
_LANES = 16
_PIECE = 512
_UNCUT = 384

# Query tokens of one request that are attended to in one call.
_MAX_CHUNK = 1024


@dataclass(frozen=True)
class DecodeBatch:
    """Decodes attended to in one call. rows: int64 [B], their tokens (None: all decodes, in order);
    slots: int64 [B * longest]; mask: [B, 1, 1, longest], 0 or -inf, or None when nothing is padded."""

    rows: Tensor | None
    slots: Tensor
    longest: int
    mask: Tensor | None


@dataclass(frozen=True)
class PrefillChunk:
    """One request's query tokens [start, end), the slots of the context they may see, and who sees what.

    mask: [end - start, context], 0 or -inf; None when the plain causal triangle is meant."""

    start: int
    end: int
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Plan:
    """How to attend in this step; the same for all layers with one sliding window."""

    decodes: list[DecodeBatch]
    prefills: list[PrefillChunk]


class TorchPagedAttention:
    """See the module's description."""

    name = "torch"
    supports_graphs = False

    def unsupported(self, spec: KVCacheSpec, arithmetic: torch.dtype) -> str | None:
        """See AttentionBackend; keys and values have the type of queries."""
        for dtype in (spec.key_dtype, spec.value_dtype):
            if dtype != arithmetic:
                names = [str(dtype).removeprefix("torch.") for dtype in (dtype, arithmetic)]
                return f"torch's operators keep keys and values in the type of the arithmetic, {names[1]}, not in {names[0]}"
        return None

    def allocate_kv_cache(self, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> KVCache:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return KVCache(zeroed(shape, spec.key_dtype, device), zeroed(shape, spec.value_dtype, device))

    def allocate_host_cache(self, num_blocks: int, spec: KVCacheSpec, device: torch.device) -> KVCache:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return KVCache(host_zeroed(shape, spec.key_dtype, device), host_zeroed(shape, spec.value_dtype, device))

    def bytes_per_block(self, spec: KVCacheSpec) -> int:
        row_bytes = spec.head_dim * (spec.key_dtype.itemsize + spec.value_dtype.itemsize)
        return spec.block_size * spec.num_kv_heads * row_bytes

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        kv_cache.key.flatten(0, 1).index_copy_(0, slot_mapping, key)
        kv_cache.value.flatten(0, 1).index_copy_(0, slot_mapping, value)

    def attend(
        self, query: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, scale: float, sliding_window: int | None
    ) -> Tensor:
        plan = metadata.plan.get(sliding_window)
        if plan is None:
            plan = make_plan(metadata, kv_cache.key.shape[1], sliding_window, query.dtype)
            metadata.plan[sliding_window] = plan
        output = torch.empty_like(query)
        for batch in plan.decodes:
            _attend_decodes(query, kv_cache, batch, metadata.num_decodes, scale, output)
        for chunk in plan.prefills:
            _attend_prefill(query, kv_cache, chunk, scale, output)
        return output

    def copy_blocks(self, kv_caches: Sequence[KVCache], source: Tensor, target: Tensor) -> None:
        copy_blocks(kv_caches, source, target)

    def swap_out(self, kv_caches: Sequence[KVCache], host_caches: Sequence[KVCache], moves: Sequence[Move]) -> None:
        move_blocks(kv_caches, host_caches, moves)

    def swap_in(self, kv_caches: Sequence[KVCache], host_caches: Sequence[KVCache], moves: Sequence[Move]) -> None:
        move_blocks(host_caches, kv_caches, moves)


def make_plan(metadata: AttentionMetadata, block_size: int, sliding_window: int | None, dtype: torch.dtype) -> Plan:
    """Gather lists and masks for a step, from the host's copy of its shape."""
    decodes = [
        _plan_decodes(metadata, rows, block_size, sliding_window, dtype)
        for rows in group_by_length(_visible_lengths(metadata, sliding_window))
    ]
    prefills = [
        chunk
        for request in range(metadata.num_decodes, metadata.num_requests)
        for chunk in _plan_prefill(metadata, request, block_size, sliding_window, dtype)
    ]
    return Plan(decodes, prefills)


def group_by_length(
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Split indices so that within a group no length is below half of the longest, small lengths excepted, and that lengths up to
    `_UNCUT` are not padded beyond it."""
    order = np.argsort(-lengths, kind="stable")
    groups = []
    while len(order):
        bound = lengths[order[0]] // 2
        if bound < _SMALL_CONTEXT:
            bound = 0
        elif lengths[order[0]] > _UNCUT:
            bound = max(bound, _UNCUT + 1)
        size = int(np.searchsorted(-lengths[order], -bound, side="right"))
        groups.append(np.sort(order[:size]))
        order = order[size:]
    return groups


def padded_length(length: int) -> int:
    """The least length to which a context may be padded; alone or in a group of `group_by_length`, longer is as good."""
    rest = length % _PIECE
    if length > _UNCUT and rest > _PIECE // 2:
        return length - rest + _PIECE
    return -(-length // _LANES) * _LANES


def _visible_lengths(
    metadata: AttentionMetadata, sliding_window: int | None
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    lengths = metadata.seq_lens_host[: metadata.num_decodes].astype(np.int64)
    return lengths if sliding_window is None else np.minimum(lengths, sliding_window)


def _plan_decodes(
    metadata: AttentionMetadata,
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    block_size: int,
    sliding_window: int | None,
    dtype: torch.dtype,
) -> DecodeBatch:
    device = metadata.block_tables.device
    lengths = _visible_lengths(metadata, sliding_window)[rows]
    longest = max(padded_length(length) for length in lengths.tolist())
    whole = len(rows) == metadata.num_decodes
    row_index = None if whole else torch.from_numpy(rows).to(device)
    seq_lens = metadata.seq_lens[: metadata.num_decodes]
    tables = metadata.block_tables[: metadata.num_decodes]
    if row_index is not None:
        seq_lens, tables = seq_lens[row_index], tables[row_index]
    contexts = seq_lens.to(torch.int64).unsqueeze(1)  # [B, 1]
    visible = contexts if sliding_window is None else contexts.clamp(max=sliding_window)
    column = torch.arange(longest, device=device)
    # Padding repeats the newest position, which is the query token's own.
    positions = contexts - visible + torch.minimum(column, visible - 1)  # [B, longest]
    blocks = tables.gather(1, positions // block_size).to(torch.int64)
    slots = blocks * block_size + positions % block_size
    mask = None
    if int(lengths.min()) < longest:
        mask = torch.zeros(slots.shape, dtype=dtype, device=device).masked_fill_(column >= visible, -torch.inf)
        mask = mask[:, None, None, :]
    return DecodeBatch(row_index, slots.flatten(), longest, mask)


def _plan_prefill(
    metadata: AttentionMetadata, request: int, block_size: int, sliding_window: int | None, dtype: torch.dtype
) -> list[PrefillChunk]:
    start, end = (int(bound) for bound in metadata.query_start_host[request : request + 2])
    # Position of query token t in its request is t + shift.
    shift = int(metadata.seq_lens_host[request]) - end
    return [
        _plan_chunk(
            metadata.block_tables[request],
            first,
            min(first + _MAX_CHUNK, end),
            shift,
            block_size,
            sliding_window,
            dtype,
        )
        for first in range(start, end, _MAX_CHUNK)
    ]


def _plan_chunk(
    block_table: Tensor,
    start: int,
    end: int,
    shift: int,
    block_size: int,
    sliding_window: int | None,
    dtype: torch.dtype,
) -> PrefillChunk:
    device = block_table.device
    first_query, context = start + shift, end + shift
    first_key = 0 if sliding_window is None else max(0, first_query - sliding_window + 1)
    key_positions = torch.arange(first_key, context, device=device)
    blocks = block_table.index_select(0, key_positions // block_size).to(torch.int64)
    slots = blocks * block_size + key_positions % block_size
    windowed = sliding_window is not None and sliding_window < context
    if end - start == 1 or (first_query == 0 and not windowed):
        return PrefillChunk(start, end, slots, None)
    query_positions = torch.arange(first_query, context, device=device).unsqueeze(1)
    hidden = key_positions > query_positions
    if sliding_window is not None:
        hidden |= key_positions <= query_positions - sliding_window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    return PrefillChunk(start, end, slots, mask)


def _attend_decodes(
    query: Tensor, kv_cache: KVCache, batch: DecodeBatch, num_decodes: int, scale: float, output: Tensor
) -> None:
    rows = query[:num_decodes] if batch.rows is None else query.index_select(0, batch.rows)
    num_kv_heads, head_dim = kv_cache.key.shape[2:]
    shape = (len(rows), batch.longest, num_kv_heads, head_dim)
    key = kv_cache.key.flatten(0, 1).index_select(0, batch.slots).view(shape).transpose(1, 2)
    value = kv_cache.value.flatten(0, 1).index_select(0, batch.slots).view(shape).transpose(1, 2)
    grouped = rows.view(len(rows), num_kv_heads, -1, head_dim)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=batch.mask, scale=scale)
    attended = attended.reshape(rows.shape)
    if batch.rows is None:
        output[:num_decodes] = attended
    else:
        output.index_copy_(0, batch.rows, attended)


def _attend_prefill(query: Tensor, kv_cache: KVCache, chunk: PrefillChunk, scale: float, output: Tensor) -> None:
    key = kv_cache.key.flatten(0, 1).index_select(0, chunk.slots).transpose(0, 1).unsqueeze(0)
    value = kv_cache.value.flatten(0, 1).index_select(0, chunk.slots).transpose(0, 1).unsqueeze(0)
    attended = F.scaled_dot_product_attention(
        query[chunk.start : chunk.end].transpose(0, 1).unsqueeze(0),
        key,
        value,
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None and chunk.end - chunk.start > 1,
        scale=scale,
        enable_gqa=query.shape[1] != kv_cache.key.shape[2],
    )
    output[chunk.start : chunk.end] = attended.squeeze(0).transpose(0, 1)
