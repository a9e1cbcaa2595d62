"""The two kernels of paged attention; attention.py launches them and says with which tiles.

`attention_kernel`: a program has the query heads of one KV head for a few query tokens of one request, as the rows of one matrix,
row = token * GROUP + head, and goes over a range of that request's keys and values:

    program (kv head, block, split)      rows [BLOCK_M, D] x keys [BLOCK_N, D] -> scores -> weights x values [BLOCK_N, D] -> sums

A tile of BLOCK_N tokens stands at a multiple of BLOCK_N of its request's positions, whatever is computed in the step, so that with
tiles of one size a token's sums have one order, however a prompt is cut into chunks. The cache is read through the block table, in rows
of D numbers, with 16 bytes a thread and several tiles ahead of the arithmetic. Tiles that no row may see are never read; only tiles
that some rows may not see pay for a mask.

The softmax is computed online (Dao et al., 2022, arXiv:2205.14135), in float32 and to the base 2: `factor` is the scale times
log2(e). Products of 8-bit numbers are products of 16-bit ones, summed in float32; scales multiply scores and weights.

`combine_kernel` adds up the splits of a context by their shares in the softmax's denominator (Flash-Decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every score; finite, so that the difference of two maxima is a number even before the first key.
LOWEST = tl.constexpr(-1e30)
# Splits that the combining kernel takes at once.
SPLIT_ROWS = tl.constexpr(16)


@triton.jit
def find_request(query_start, block, first_request, end_request, BLOCK_Q: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """The request whose query tokens block `block` has, and which of the request's blocks it is, which may be one too many.

    Request r begins at block (query_start[r] - query_start[first_request]) // BLOCK_Q + r - first_request: that leaves room for the
    last, incomplete block of each request, and needs no table."""
    low = first_request
    begin = 0
    if ONE_BLOCK:
        low += block
        begin += block
    else:
        first_token = tl.load(query_start + first_request)
        high = end_request
        while high - low > 1:
            middle = (low + high) // 2
            begins = (tl.load(query_start + middle) - first_token) // BLOCK_Q + middle - first_request
            if begins <= block:
                low = middle
                begin = begins
            else:
                high = middle
    return low, block - begin


@triton.jit
def widened(tile, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Cached numbers in the type of the arithmetic, exactly. FORMAT 'number': they are what their type says. 'e4m3': bytes that are 8-bit
    floats. 'e4m3 by bits': the same, for GPUs that do not know them: the bits are moved to where float16 has its own; as the biases of
    the exponents differ by 8, the result is a 256th, subnormal numbers included."""
    if FORMAT == "e4m3 by bits":
        wide = tile.to(tl.uint16)
        moved = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return moved.to(tl.float16, bitcast=True).to(tl.float32).to(dtype)
    elif FORMAT == "e4m3":
        # By float32: from float16 to bfloat16 directly there is only a conversion that is as slow as a division.
        return tile.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32).to(dtype)
    else:
        return tile.to(dtype)


@triton.jit
def tile_range(oldest, newest, window, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr):
    """Tiles that tokens at the positions `oldest` to `newest` see, or this program's share of them: from the first up to the last. Every
    token sees the whole of those from `unmasked` up to `masked`. None at all where positions are negative."""
    first_tile = 0
    unmasked = 0
    if WINDOWED:
        first_tile = tl.maximum(oldest - window + 1, 0) // BLOCK_N
        unmasked = tl.cdiv(tl.maximum(newest - window + 1, 0), BLOCK_N)
    masked = tl.maximum(oldest + 1, 0) // BLOCK_N
    last_tile = tl.maximum(newest + BLOCK_N, 0) // BLOCK_N
    if SPLIT:
        share = tl.cdiv(last_tile - first_tile, tl.num_programs(2))
        first_tile += tl.program_id(2) * share
        last_tile = tl.minimum(first_tile + share, last_tile)
    return first_tile, unmasked, masked, last_tile


@triton.jit
def find_slots(block_table, key_position, seq_len, BLOCK_SIZE: tl.constexpr):
    """Where the tokens at key_position are cached. Behind the context its last token is given again: what lies in memory there may be no
    number, and 0 times that is none either. Unsigned, because a division is then a shift."""
    existing = tl.minimum(key_position, seq_len - 1).to(tl.uint32)
    block = tl.load(block_table + existing // BLOCK_SIZE)
    return block.to(tl.int64) * BLOCK_SIZE + existing % BLOCK_SIZE


@triton.jit
def visible_scores(scores, position, key_position, window, WINDOWED: tl.constexpr):
    """-inf for the keys that a row does not see."""
    visible = key_position[None, :] <= position[:, None]
    if WINDOWED:
        visible &= key_position[None, :] > position[:, None] - window
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def softmax_step(scores, factor, maximum, total):
    """Online softmax: the tile's weights, by what to shrink what was summed up before, and the new maxima and denominators."""
    highest = tl.maximum(maximum, tl.max(scores, axis=1) * factor)
    weights = tl.exp2(scores * factor - highest[:, None])
    shrink = tl.exp2(maximum - highest)
    return weights, shrink, highest, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def store_partial(
    partial_sums,
    partial_logs,
    first_line,
    line,
    result,
    maximum,
    total,
    real,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A split's results, rows `first_line + line` of [T, H]; where it has no keys, only that."""
    first_line = first_line * tl.num_programs(2) + tl.program_id(2)
    line *= tl.num_programs(2)
    dimension = tl.arange(0, BLOCK_D)
    found = real & (total > 0.0)
    logs = tl.where(found, maximum + tl.log2(tl.where(found, total, 1.0)), float("-inf"))
    tl.store(partial_logs + first_line + line, logs, mask=real)
    cells = line[:, None] * HEAD_DIM + dimension[None, :]
    wanted = found[:, None] & (dimension < HEAD_DIM)[None, :]
    tl.store(partial_sums + first_line * HEAD_DIM + cells, result, mask=wanted)


@triton.jit(
    do_not_specialize=["first_request", "end_request", "first_token", "table_stride", "window"],
    do_not_specialize_on_alignment=["query_start", "seq_lens", "block_tables"],
)
def attention_kernel(
    query,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    output,
    partial_sums,
    partial_logs,
    query_start,
    seq_lens,
    block_tables,
    first_request,
    end_request,
    first_token,
    query_stride,
    table_stride,
    factor,
    value_factor,
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS_SCALED: tl.constexpr,
    VALUES_SCALED: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    VALUE_FORMAT: tl.constexpr,
    WINDOWED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Shapes: see attention.paged_attention. ONE_BLOCK: each request has at most BLOCK_Q query tokens and one block. SPLIT: results go to
    partial_sums [T, H, splits, D], normalised, and partial_logs [T, H, splits], the base-2 logarithms of the softmax's denominators
    (-inf for a split without keys); else to output [T, H, D]. In all three T counts from first_token."""
    kv_head = tl.program_id(0)
    # Blocks with the most context come first: the last block of a prompt sees all of it, and should not be what is waited for.
    query_block = tl.num_programs(1) - 1 - tl.program_id(1)
    request, own_block = find_request(query_start, query_block, first_request, end_request, BLOCK_Q, ONE_BLOCK)
    first_row = own_block * BLOCK_Q
    start = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - start
    if first_row >= query_len:
        return

    seq_len = tl.load(seq_lens + request)
    row = tl.arange(0, BLOCK_M)
    own_token = first_row + row // GROUP
    real = (row // GROUP < BLOCK_Q) & (own_token < query_len)
    position = seq_len - query_len + own_token
    dimension = tl.arange(0, BLOCK_D)
    inside = (dimension < HEAD_DIM)[None, :]
    token = (start + first_row).to(tl.int64)
    query += token * query_stride + kv_head * GROUP * HEAD_DIM
    cells = (row // GROUP * query_stride + row % GROUP * HEAD_DIM)[:, None] + dimension[None, :]
    rows = tl.load(query + cells, mask=real[:, None] & inside, other=0.0)

    # Positions of the block's first and last token.
    oldest = seq_len - query_len + first_row
    newest = seq_len - query_len + tl.minimum(first_row + BLOCK_Q, query_len) - 1
    first_tile, unmasked, masked, last_tile = tile_range(oldest, newest, window, BLOCK_N, WINDOWED, SPLIT)

    sums = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    maximum = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    block_table = block_tables + request.to(tl.int64) * table_stride
    key_cache += kv_head * HEAD_DIM
    value_cache += kv_head * HEAD_DIM
    for tile in range(first_tile, last_tile):
        key_position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = find_slots(block_table, key_position, seq_len, BLOCK_SIZE)
        numbers = slot[:, None] * (NUM_KV_HEADS * HEAD_DIM) + dimension[None, :]
        key = widened(tl.load(key_cache + numbers, mask=inside, other=0), rows.dtype, KEY_FORMAT)
        scores = tl.dot(rows, tl.trans(key), input_precision="ieee")
        if KEYS_SCALED:
            scores *= tl.load(key_scales + slot * NUM_KV_HEADS + kv_head)[None, :]
        if (tile < unmasked) | (tile >= masked):
            scores = visible_scores(scores, position, key_position, window, WINDOWED)
        weights, shrink, maximum, total = softmax_step(scores, factor, maximum, total)
        if VALUES_SCALED:
            weights *= tl.load(value_scales + slot * NUM_KV_HEADS + kv_head)[None, :]
        value = widened(tl.load(value_cache + numbers, mask=inside, other=0), rows.dtype, VALUE_FORMAT)
        sums = tl.dot(weights.to(rows.dtype), value, sums * shrink[:, None], input_precision="ieee")

    result = sums * (value_factor / tl.where(total > 0.0, total, 1.0))[:, None]
    first_line = (token - first_token) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP
    line = row // GROUP * (NUM_KV_HEADS * GROUP) + row % GROUP
    if SPLIT:
        store_partial(partial_sums, partial_logs, first_line, line, result, maximum, total, real, HEAD_DIM, BLOCK_D)
    else:
        cells = output + first_line * HEAD_DIM + line[:, None] * HEAD_DIM + dimension[None, :]
        tl.store(cells, result.to(output.dtype.element_ty), mask=real[:, None] & inside)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial_sums, partial_logs, output, splits, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MAX_SPLITS: tl.constexpr
):
    """One token and head per program: the average of its splits' results, each weighted with its denominator. Splits without keys are not
    read."""
    line = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    every = tl.arange(0, MAX_SPLITS)
    logs = tl.load(partial_logs + line * splits + every, mask=every < splits, other=float("-inf"))
    highest = tl.maximum(tl.max(logs, axis=0), LOWEST)
    total = tl.sum(tl.exp2(logs - highest), axis=0)
    dimension = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, splits, SPLIT_ROWS):
        split = first + tl.arange(0, SPLIT_ROWS)
        log = tl.load(partial_logs + line * splits + split, mask=split < splits, other=float("-inf"))
        found = (log > float("-inf"))[:, None] & (dimension < HEAD_DIM)[None, :]
        address = (line * splits + split)[:, None] * HEAD_DIM + dimension[None, :]
        part = tl.load(partial_sums + address, mask=found, other=0.0)
        sums += tl.sum(part * tl.exp2(log - highest)[:, None], axis=0)
    result = sums / tl.where(total > 0.0, total, 1.0)
    tl.store(output + line * HEAD_DIM + dimension, result.to(output.dtype.element_ty), mask=dimension < HEAD_DIM)
