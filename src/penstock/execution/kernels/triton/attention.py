"""Attention over paged keys and values: launches the kernels of attention_kernel.py. Twin: `paged_attention_twin`.

What is read and written: a decode reads its context's keys and values once, 2 * KVH * D numbers a token, which bounds its time; all heads
of a group share one read. The context is split over as many programs as fill the GPU, whose results are combined by a second, small
kernel. A prefill reads them once per block of query tokens, from the L2 cache for the most part, and is bound by arithmetic.

Everything that is decided on the host follows from shapes: the same call can be recorded in a CUDA graph and replayed with other numbers.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.attention import attention_twin
from penstock.execution.kernels.triton import support
from penstock.execution.kernels.triton.attention_kernel import attention_kernel, combine_kernel
from penstock.execution.kernels.triton.attention_tiles import (
    MAX_SHORT_ROWS,
    MIN_ROWS,
    PROGRAMS_PER_MULTIPROCESSOR,
    Call,
    Part,
    Tiles,
    long_tiles,
    padded,
    short_tiles,
)

# Types of keys and values beside that of queries; their scales are float32, one per token and head.
ROUNDED_DTYPES = (torch.int8, torch.float8_e4m3fn)
MAX_HEAD_DIM = 256

# What the numbers that the kernel makes of a format have to be multiplied with.
_UNIT = {"number": 1.0, "e4m3": 1.0, "e4m3 by bits": 256.0}
# Of a thread; as many as the hardware has names for.
_MAX_REGISTERS = 255
# What `combine_kernel` takes in one piece.
_MAX_SPLITS = 128
# Splitting further is worth it while the last wave of programs leaves more of the GPU idle than this.
_MIN_OCCUPANCY = 0.85


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    *,
    query_start: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    num_decodes: int,
    scale: float,
    sliding_window: int | None,
    max_query_len: int | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Causal attention of query [T, H, D] over each request's context; returns [T, H, D], or `output`, which must be contiguous.

    key_cache, value_cache: [num_blocks, block_size, KVH, D], each in the type of queries, int8 or float8_e4m3fn; scales: float32
    [num_blocks, block_size, KVH] for the last two. query_start, seq_lens, block_tables, num_decodes, sliding_window: see
    AttentionMetadata and AttentionBackend. max_query_len: at least the most query tokens of a request behind the decodes; a small
    number lets their contexts be split, too. A request whose seq_len is 0 gives zeros.

    A decode's result does not depend on other requests' numbers, and on how many there are only through the number of splits
    (`num_splits`), which is a function of shapes. Raises IntegrityError for tensors that do not fit each other.
    """
    if output is None:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    call = Call(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        key_scales=key_scales,
        value_scales=value_scales,
        query_start=query_start,
        seq_lens=seq_lens,
        block_tables=block_tables,
        scale=scale,
        sliding_window=sliding_window,
        output=output,
    )
    _check(call)
    if num_decodes:
        _launch_short(call, Part(0, num_decodes, 0, num_decodes), 1)
    if num_decodes < len(seq_lens):
        rest = Part(num_decodes, len(seq_lens) - num_decodes, num_decodes, len(query) - num_decodes)
        if max_query_len is not None and max_query_len * call.group <= MAX_SHORT_ROWS:
            _launch_short(call, rest, max_query_len)
        else:
            _launch_long(call, rest)
    return output


@lru_cache(maxsize=4096)
def num_splits(programs: int, tiles: int, places: int) -> int:
    """Into how many parts contexts of up to `tiles` tiles are cut, when there are `programs` without cutting and a GPU runs `places` of
    them at once: the fewest that keep it busy, counted in whole waves."""

    def occupancy(splits: int) -> float:
        waves = programs * splits / places
        return waves / math.ceil(waves)

    best = 1
    for splits in range(1, min(tiles, _MAX_SPLITS) + 1):
        if occupancy(splits) >= _MIN_OCCUPANCY:
            return splits
        if occupancy(splits) > occupancy(best):
            best = splits
    return best


def _launch_short(call: Call, part: Part, max_query_len: int) -> None:
    """Requests with at most `max_query_len` query tokens, each one block of rows: decodes, and the verification of a few drafts."""
    rows = max(MIN_ROWS, triton.next_power_of_2(max_query_len * call.group))
    tiles = short_tiles(call, rows)
    places = PROGRAMS_PER_MULTIPROCESSOR * support.gpu(call.query.device).num_multiprocessors
    splits = num_splits(part.num_requests * call.num_kv_heads, call.max_tiles(max_query_len, tiles.keys), places)
    _launch(call, tiles, part, part.num_requests, splits, max_query_len)


def _launch_long(call: Call, part: Part) -> None:
    """Requests with any number of query tokens. Their blocks are counted generously, because only the device knows where one request ends
    and the next begins; a program without a block ends at once. Contexts are split when that leaves most of the GPU idle."""
    tiles = long_tiles(call, triton.cdiv(part.num_tokens, part.num_requests))
    block_tokens = tiles.rows // call.group
    num_blocks = part.num_tokens // block_tokens + part.num_requests
    programs, places = num_blocks * call.num_kv_heads, support.gpu(call.query.device).num_multiprocessors
    splits = 1
    if 2 * programs <= places:
        splits = num_splits(programs, call.max_tiles(block_tokens, tiles.keys), places)
    _launch(call, tiles, part, num_blocks, splits, None)


def _launch(call: Call, tiles: Tiles, part: Part, num_blocks: int, splits: int, max_query_len: int | None) -> None:
    """The attention kernel over `num_blocks` blocks of rows, and, if contexts are split, what combines the splits. max_query_len None: a
    request may have several blocks."""
    output = call.output[part.first_token :]
    if splits == 1:
        _launch_kernel(call, tiles, part, (call.num_kv_heads, num_blocks, 1), output, None, max_query_len)
        return
    num_heads = call.query.shape[1]
    sums = output.new_empty((part.num_tokens, num_heads, splits, call.head_dim), dtype=torch.float32)
    logs = output.new_empty((part.num_tokens, num_heads, splits), dtype=torch.float32)
    _launch_kernel(call, tiles, part, (call.num_kv_heads, num_blocks, splits), output, (sums, logs), max_query_len)
    combine_kernel[(part.num_tokens, num_heads)](
        sums,
        logs,
        output,
        splits,
        HEAD_DIM=call.head_dim,
        BLOCK_D=padded(call.head_dim),
        MAX_SPLITS=_MAX_SPLITS,
        num_warps=4,
    )


def _launch_kernel(
    call: Call,
    tiles: Tiles,
    part: Part,
    grid: tuple[int, int, int],
    output: Tensor,
    partial: tuple[Tensor, Tensor] | None,
    max_query_len: int | None,
) -> None:
    key_format, value_format = _format(call.key_cache), _format(call.value_cache)
    sums, logs = partial or (output, output)
    attention_kernel[grid](
        call.query,
        _bytes_or_numbers(call.key_cache),
        _bytes_or_numbers(call.value_cache),
        call.key_cache if call.key_scales is None else call.key_scales,
        call.value_cache if call.value_scales is None else call.value_scales,
        output,
        sums,
        logs,
        call.query_start,
        call.seq_lens,
        call.block_tables,
        part.first_request,
        part.first_request + part.num_requests,
        part.first_token,
        call.query.stride(0),
        call.block_tables.stride(0),
        call.scale * math.log2(math.e) * _UNIT[key_format],
        _UNIT[value_format],
        call.sliding_window or 0,
        NUM_KV_HEADS=call.num_kv_heads,
        GROUP=call.group,
        HEAD_DIM=call.head_dim,
        BLOCK_D=padded(call.head_dim),
        BLOCK_SIZE=call.key_cache.shape[1],
        BLOCK_M=tiles.rows,
        BLOCK_Q=max_query_len or tiles.rows // call.group,
        BLOCK_N=tiles.keys,
        KEYS_SCALED=call.key_scales is not None,
        VALUES_SCALED=call.value_scales is not None,
        KEY_FORMAT=key_format,
        VALUE_FORMAT=value_format,
        WINDOWED=call.sliding_window is not None,
        ONE_BLOCK=max_query_len is not None,
        SPLIT=partial is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        # Left alone, the assembler would rather spill a few registers than have fewer programs on a multiprocessor.
        maxnreg=_MAX_REGISTERS,
    )


def _format(cache: Tensor) -> str:
    """How the kernel reads the cache's numbers, see attention_kernel.widened."""
    if cache.dtype != torch.float8_e4m3fn:
        return "number"
    return "e4m3" if support.gpu(cache.device).has_fp8 else "e4m3 by bits"


def _bytes_or_numbers(cache: Tensor) -> Tensor:
    """8-bit floats as bytes, which every GPU can load."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _check(call: Call) -> None:
    """Raises IntegrityError when tensors do not have the layout that the kernel's addresses assume."""
    query, key = call.query, call.key_cache
    if query.stride(2) != 1 or query.stride(1) != query.shape[2] or query.shape[1] % key.shape[2]:
        raise IntegrityError(f"query heads are not rows: {tuple(query.shape)}, strides {query.stride()}")
    pairs = ((key, call.key_scales), (call.value_cache, call.value_scales))
    for cache, scales in pairs:
        if cache.shape != key.shape or cache.shape[3] != query.shape[2] or not cache.is_contiguous():
            raise IntegrityError(f"the cache does not fit queries {tuple(query.shape)}: {tuple(cache.shape)}")
        if cache.dtype != query.dtype and cache.dtype not in ROUNDED_DTYPES:
            raise IntegrityError(f"queries of {query.dtype} over a cache of {cache.dtype}")
        if (scales is not None) != (cache.dtype in ROUNDED_DTYPES):
            raise IntegrityError(f"a cache of {cache.dtype} {'without' if scales is None else 'with'} scales")
        if scales is not None and (scales.shape != cache.shape[:3] or not scales.is_contiguous()):
            raise IntegrityError(f"scales {tuple(scales.shape)} of a cache {tuple(cache.shape)}")
    if call.block_tables.stride(1) != 1 or call.block_tables.dtype != torch.int32:
        raise IntegrityError(f"block tables of {call.block_tables.dtype}, strides {call.block_tables.stride()}")
    if not call.output.is_contiguous() or call.output.shape != query.shape:
        raise IntegrityError(f"the output is not contiguous or not of the shape {tuple(query.shape)}")


def paged_attention_twin(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    *,
    query_start: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """`paged_attention`, request by request and written out in `compute`, on a CPU."""
    output = torch.zeros(query.shape, dtype=compute)
    starts = query_start.tolist()
    for request, seq_len in enumerate(seq_lens.tolist()):
        start, end = starts[request : request + 2]
        if seq_len and end > start:
            blocks = block_tables[request, : -(-seq_len // key_cache.shape[1])].long()
            key = read_cached(key_cache, key_scales, blocks)[:seq_len].cpu()
            value = read_cached(value_cache, value_scales, blocks)[:seq_len].cpu()
            output[start:end] = attention_twin(query[start:end].cpu(), key, value, scale, sliding_window, compute)
    return output


def read_cached(cache: Tensor, scales: Tensor | None, blocks: Tensor) -> Tensor:
    """Keys or values of the blocks int64 [n], in the order of tokens → float32 [n * block_size, KVH, D]."""
    chosen = _bytes_or_numbers(cache).index_select(0, blocks).view(cache.dtype).to(torch.float32)
    if scales is not None:
        chosen = chosen * scales.index_select(0, blocks).unsqueeze(-1)
    return chosen.flatten(0, 1)
