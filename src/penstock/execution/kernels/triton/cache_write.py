"""Writes keys and values into the paged cache, and on the way normalises, rotates and rounds heads: one kernel between the projections and
attention. Twins: `*_twin`.

Every number of the projections is read once and every result written once: 2 * (H + 2 * KVH) * D numbers a token, half as much for the
part of it that is stored in 8 bits. A program has some heads of one token, all queries, all keys or all values, as two matrices with the
halves of each head, so that the two numbers which are rotated together meet in one thread. With few tokens each head has its own
program, else a program has enough of them for a thread to load 16 bytes.

8-bit numbers are x / scale with scale = max|x| / limit over a token's head: limit 127 for int8, 448 for float8_e4m3fn. A head of zeros
has scale 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.errors import IntegrityError

_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Up to this many heads of all tokens, each has its own program: that many are on the GPU at once.
_SEPARATE_HEADS = 4096
_HEADS_PER_PROGRAM = 8


def rotate_and_write(
    heads: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    *,
    table: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """heads [T, H + 2 * KVH, D] (query, key and value heads) → rotated queries [T, H, D]; rotated keys, and values, go to their slots in
    the caches [num_blocks, block_size, KVH, D] (scales [num_blocks, block_size, KVH]), but not to negative ones.

    table: float32 [P, D], D/2 cosines and D/2 sines of each position; positions, slot_mapping: int64 [T]. With q_norm and k_norm [D],
    query and key heads are RMS-normalised before. Everything is computed in float32 and rounded once, when it is stored. Raises
    IntegrityError for tensors that are not laid out so.
    """
    num_kv_heads = key_cache.shape[2]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    query = torch.empty((len(heads), num_heads, heads.shape[2]), dtype=heads.dtype, device=heads.device)
    _launch(
        heads,
        heads[:, num_heads : num_heads + num_kv_heads],
        heads[:, num_heads + num_kv_heads :],
        query,
        (key_cache, value_cache, key_scales, value_scales),
        slot_mapping,
        table=table,
        positions=positions,
        norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
        eps=eps,
    )
    return query


def write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    slot_mapping: Tensor,
) -> None:
    """Store key and value [T, KVH, D] as they are at their slots, but not at negative ones."""
    caches = (key_cache, value_cache, key_scales, value_scales)
    _launch(key, key, value, None, caches, slot_mapping, table=None, positions=None, norms=None, eps=0.0)


def _launch(
    query_heads: Tensor,
    key_heads: Tensor,
    value_heads: Tensor,
    query: Tensor | None,
    caches: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    slot_mapping: Tensor,
    *,
    table: Tensor | None,
    positions: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> None:
    key_cache, value_cache, key_scales, value_scales = caches
    num_tokens, num_kv_heads, head_dim = key_heads.shape
    _check(query_heads, key_heads, value_heads, caches)
    num_heads = 0 if query is None else query.shape[1]
    separate = num_tokens * (num_heads + 2 * num_kv_heads) <= _SEPARATE_HEADS
    block_heads = 1 if separate else min(_HEADS_PER_PROGRAM, triton.next_power_of_2(num_kv_heads))
    block_half = triton.next_power_of_2(head_dim // 2)
    if num_tokens == 0:
        return
    programs = triton.cdiv(num_heads, block_heads) + 2 * triton.cdiv(num_kv_heads, block_heads)
    _write_kernel[(num_tokens, programs)](
        query_heads,
        key_heads,
        value_heads,
        key_heads if query is None else query,
        _bytes_or_numbers(key_cache),
        _bytes_or_numbers(value_cache),
        key_cache if key_scales is None else key_scales,
        value_cache if value_scales is None else value_scales,
        slot_mapping,
        slot_mapping if positions is None else positions,
        key_heads if table is None else table,
        key_heads if norms is None else norms[0],
        key_heads if norms is None else norms[1],
        eps,
        key_heads.stride(0),
        value_heads.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_HALF=block_half,
        BLOCK_HEADS=block_heads,
        ROTATE=table is not None,
        NORMALISE=norms is not None,
        KEY_LIMIT=_LIMITS.get(key_cache.dtype, 0.0),
        VALUE_LIMIT=_LIMITS.get(value_cache.dtype, 0.0),
        num_warps=max(1, min(4, block_heads * block_half // 256)),
    )


def _check(
    query_heads: Tensor,
    key_heads: Tensor,
    value_heads: Tensor,
    caches: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> None:
    head_dim = key_heads.shape[2]
    for heads in (query_heads, key_heads, value_heads):
        if heads.stride(2) != 1 or (heads.shape[1] > 1 and heads.stride(1) != head_dim):
            raise IntegrityError(f"heads are not rows: {tuple(heads.shape)}, strides {heads.stride()}")
    for cache, scales in (caches[::2], caches[1::2]):
        if cache is None or cache.shape[2:] != key_heads.shape[1:] or not cache.is_contiguous():
            raise IntegrityError(f"the cache does not fit keys {tuple(key_heads.shape)}")
        if (scales is not None) != (cache.dtype in _LIMITS):
            raise IntegrityError(f"a cache of {cache.dtype} {'without' if scales is None else 'with'} scales")


def _bytes_or_numbers(cache: Tensor) -> Tensor:
    """8-bit floats as bytes: the kernel makes their bits, on every GPU."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


@triton.jit
def _write_kernel(
    query_heads,
    key_heads,
    value_heads,
    query,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slot_mapping,
    positions,
    table,
    query_norm,
    key_norm,
    eps,
    key_stride,
    value_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
    NORMALISE: tl.constexpr,
    KEY_LIMIT: tl.constexpr,
    VALUE_LIMIT: tl.constexpr,
):
    QUERY_PARTS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_PARTS: tl.constexpr = (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if part < QUERY_PARTS:
        head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        first, second = _load_heads(query_heads + token * key_stride, head, NUM_HEADS, HEAD_DIM, BLOCK_HALF)
        if NORMALISE:
            first, second = _normalised(first, second, query_norm, eps, HEAD_DIM, BLOCK_HALF)
        if ROTATE:
            first, second = _rotated(first, second, positions + token, table, HEAD_DIM, BLOCK_HALF)
        _store_heads(query, token * NUM_HEADS + head, head < NUM_HEADS, first, second, HEAD_DIM, BLOCK_HALF)
    elif slot >= 0:
        if part < QUERY_PARTS + KV_PARTS:
            head = (part - QUERY_PARTS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            first, second = _load_heads(key_heads + token * key_stride, head, NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF)
            if NORMALISE:
                first, second = _normalised(first, second, key_norm, eps, HEAD_DIM, BLOCK_HALF)
            if ROTATE:
                first, second = _rotated(first, second, positions + token, table, HEAD_DIM, BLOCK_HALF)
            row = slot * NUM_KV_HEADS + head
            _store_rounded(
                key_cache, key_scales, row, head < NUM_KV_HEADS, first, second, HEAD_DIM, BLOCK_HALF, KEY_LIMIT
            )
        else:
            head = (part - QUERY_PARTS - KV_PARTS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            first, second = _load_heads(value_heads + token * value_stride, head, NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF)
            row = slot * NUM_KV_HEADS + head
            _store_rounded(
                value_cache, value_scales, row, head < NUM_KV_HEADS, first, second, HEAD_DIM, BLOCK_HALF, VALUE_LIMIT
            )


@triton.jit
def _load_heads(heads, head, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The halves of some heads of a token, float32 [BLOCK_HEADS, BLOCK_HALF] each, zero behind their ends."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < NUM_HEADS)[:, None] & (pair < HALF)
    address = heads + head[:, None] * HEAD_DIM + pair
    first = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(address + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _normalised(first, second, weight, eps, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr):
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, BLOCK_HALF)
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    first_weight = tl.load(weight + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    second_weight = tl.load(weight + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    return first * scale * first_weight, second * scale * second_weight


@triton.jit
def _rotated(first, second, position, table, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr):
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, BLOCK_HALF)
    line = table + tl.load(position) * HEAD_DIM + pair
    cos = tl.load(line, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(line + HALF, mask=pair < HALF, other=0.0)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_heads(target, row, real, first, second, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr):
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    inside = real[:, None] & (pair < HALF)
    address = target + row[:, None] * HEAD_DIM + pair
    tl.store(address, first.to(target.dtype.element_ty), mask=inside)
    tl.store(address + HALF, second.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _store_rounded(
    cache, scales, row, real, first, second, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, LIMIT: tl.constexpr
):
    """LIMIT: the largest of the 8-bit numbers; 0 when the cache keeps wider ones."""
    if LIMIT > 0:
        largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        # Exact divisions: the largest number has to become the limit, not what is next to it.
        limit = tl.full(largest.shape, LIMIT, dtype=tl.float32)
        tl.store(scales + row, tl.div_rn(largest, limit), mask=real)
        factor = tl.div_rn(limit, tl.where(largest > 0.0, largest, limit))[:, None]
        if LIMIT == 127:
            first, second = tl.floor(first * factor + 0.5), tl.floor(second * factor + 0.5)
        else:
            first, second = _e4m3_bits(first * factor), _e4m3_bits(second * factor)
    _store_heads(cache, row, real, first, second, HEAD_DIM, BLOCK_HALF)


@triton.jit
def _e4m3_bits(x):
    """The nearest e4m3 numbers, ties to even, as uint8, of float32 numbers that are at most 448 but for rounding."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    # Three bits of fraction are kept; the exponent's bias goes from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2 ** -6 numbers are multiples of 2 ** -9, which is the last bit of 2 ** 14 + x.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0xF
    number = tl.minimum(tl.where(magnitude < 0.015625, subnormal, normal), 0x7E)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (number | sign).to(tl.uint8)


def rotate_and_write_twin(
    heads: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    *,
    table: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """`rotate_and_write` in torch's operators."""
    num_kv_heads = key_cache.shape[2]
    query, key, value = heads.float().split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        query = torch.nn.functional.rms_norm(query, query.shape[2:], q_norm.float(), eps)
        key = torch.nn.functional.rms_norm(key, key.shape[2:], k_norm.float(), eps)
    cos, sin = table.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    write_twin(rotated(key), value, key_cache, value_cache, key_scales, value_scales, slot_mapping)
    return rotated(query).to(heads.dtype)


def write_twin(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    slot_mapping: Tensor,
) -> None:
    """`write` in torch's operators."""
    wanted = slot_mapping >= 0
    slots = slot_mapping[wanted]
    for rows, cache, scales in ((key, key_cache, key_scales), (value, value_cache, value_scales)):
        chosen = rows[wanted].float()
        if scales is not None:
            largest = chosen.abs().amax(-1)
            scales.flatten(0, 1)[slots] = largest / _LIMITS[cache.dtype]
            chosen = chosen * (_LIMITS[cache.dtype] / largest.where(largest > 0, 1.0)).unsqueeze(-1)
        if cache.dtype == torch.int8:
            chosen = torch.floor(chosen + 0.5)
        rounded = _bytes_or_numbers(chosen.to(cache.dtype))
        _bytes_or_numbers(cache).flatten(0, 1)[slots] = rounded
