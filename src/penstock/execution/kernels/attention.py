"""Attention over the tiled KV cache: the call into C++ (csrc/attention.h), and its twin.

The cache holds tiles of 16 tokens (csrc/abi.h), with B the block size:

    keys    [num_blocks, KVH, B / 16, D, 16]       scales (int8 only)   float32 [num_blocks, KVH, B]
    values  [num_blocks, KVH, B / 16, 16, D]
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from penstock.execution.kernels.native import library

# Tokens of a tile; a block is whole tiles.
TILE_TOKENS = 16
# KVKind in csrc/abi.h.
KV_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class KVCacheStruct(ctypes.Structure):
    """KVCacheLayer in csrc/abi.h."""

    _fields_ = [
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
    ]


class AttentionStruct(ctypes.Structure):
    """AttentionCall in csrc/kernels.h; `partials` is provided by the callee."""

    _fields_ = [
        ("query", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("output_stride", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("num_requests", ctypes.c_int32),
        ("kv_kind", ctypes.c_int32),
        ("num_tokens", ctypes.c_int64),
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("sliding_window", ctypes.c_int32),
        ("cache", KVCacheStruct),
        ("partials", ctypes.c_void_p),
    ]


@cache
def _function() -> Any:
    function = library().penstock_attention
    function.argtypes = [ctypes.POINTER(AttentionStruct)]
    function.restype = None
    return function


def attend(call: AttentionStruct) -> None:
    """Run one attention call. Everything that it points to is contiguous as csrc/kernels.h says, and outlives the call."""
    _function()(ctypes.byref(call))


def read_cached(tiles: Tensor, scales: Tensor | None, blocks: Tensor, *, keys: bool) -> Tensor:
    """Keys (or values) of the blocks int64 [n], in the order of tokens → float32 [n * B, KVH, D]."""
    chosen = tiles.index_select(0, blocks).to(torch.float32)  # [n, KVH, B / 16, D, 16] or [..., 16, D]
    if keys:
        chosen = chosen.transpose(-1, -2)
    rows = chosen.flatten(2, 3)  # [n, KVH, B, D]
    if scales is not None:
        rows = rows * scales.index_select(0, blocks).unsqueeze(-1)
    return rows.transpose(1, 2).flatten(0, 1)


def attention_twin(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None, compute: torch.dtype
) -> Tensor:
    """Causal attention of one request, written out in `compute`: query [T, H, D], its last T tokens, over key and value [context, KVH, D].

    With a sliding window W, a token sees itself and the W - 1 before it. Returns [T, H, D].
    """
    group = query.shape[1] // key.shape[1]
    context, tokens = len(key), len(query)
    keys = key.to(compute).repeat_interleave(group, 1)
    values = value.to(compute).repeat_interleave(group, 1)
    scores = torch.einsum("thd,chd->htc", query.to(compute), keys) * scale
    positions = torch.arange(context - tokens, context).unsqueeze(1)
    others = torch.arange(context)
    hidden = others > positions
    if sliding_window is not None:
        hidden |= others <= positions - sliding_window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("htc,chd->thd", weights, values)
