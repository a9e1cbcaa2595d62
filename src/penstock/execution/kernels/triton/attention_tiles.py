"""How paged attention is cut into programs and tiles. Sizes were found by compiling for compute capabilities 8.0 and 9.0: they are the
largest that need no memory for registers, and fit what shared memory there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from penstock.execution.kernels.triton import support

# Rows of the smallest tensor-core product, and the most of one program.
MIN_ROWS = 16
_MAX_ROWS = 128
# Up to this many rows, query tokens and heads of a group, a request is one block.
MAX_SHORT_ROWS = 64
# Programs of short requests that a multiprocessor has at once, by shared memory and registers.
PROGRAMS_PER_MULTIPROCESSOR = 2


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut: rows and keys of a tile, warps of a program, and how many iterations the compiler overlaps. A tile's address
    comes from the block table, so that a load is two loads, one after the other: of 2 * n + 1 stages, n are tiles on their way."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Part:
    """The requests of one launch, and their query tokens: these follow each other in the batch."""

    first_request: int
    num_requests: int
    first_token: int
    num_tokens: int


@dataclass(frozen=True)
class Call:
    """The arguments of one `paged_attention`, checked, and what follows from their shapes."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    scale: float
    sliding_window: int | None
    output: Tensor

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.num_kv_heads

    @property
    def num_kv_heads(self) -> int:
        return self.key_cache.shape[2]

    @property
    def rounded(self) -> bool:
        """Whether keys or values have 8 bits."""
        return self.key_scales is not None or self.value_scales is not None

    @property
    def head_dim(self) -> int:
        return self.query.shape[2]

    def max_tiles(self, query_len: int, tile_keys: int) -> int:
        """Tiles that a block of `query_len` tokens may see: those that fit the block tables and the window."""
        context = self.block_tables.shape[1] * self.key_cache.shape[1]
        if self.sliding_window is not None:
            context = min(context, self.sliding_window + query_len + tile_keys)
        return -(-context // tile_keys)


def short_tiles(call: Call, rows: int) -> Tiles:
    """Bound by memory: tiles of 16 KiB of keys and as much of values, of which two are on their way while a third is worked on. With two
    programs on a multiprocessor that is more than what it takes to hide the latency of 4.8 TB/s: 25 KiB for each of 132."""
    if call.query.dtype == torch.float32:
        return Tiles(rows, 32, num_warps=4 if rows == MIN_ROWS else 8, num_stages=3)
    if rows > MIN_ROWS:
        return _small_tiles(call, rows)
    widest = max(call.key_cache.element_size(), call.value_cache.element_size())
    keys = 16_384 // (padded(call.head_dim) * widest)
    return Tiles(rows, max(32, min(keys, 128)), num_warps=4, num_stages=5)


def long_tiles(call: Call, tokens: int) -> Tiles:
    """Bound by arithmetic, if there are many tokens: then 128 rows, for 128 products per number read, in eight warps, and as many keys as
    registers and shared memory allow; on Hopper 128 keys are what lets its asynchronous products be limited by the tensor cores and
    not by shared memory. `tokens`: query tokens of the average request; when they fill fewer rows, smaller programs waste less."""
    group_rows = triton.next_power_of_2(call.group)
    if call.query.dtype == torch.float32:
        return Tiles(max(MIN_ROWS, group_rows), 32, num_warps=4, num_stages=1)
    rows = max(MIN_ROWS, group_rows, min(_MAX_ROWS, triton.next_power_of_2(tokens * call.group)))
    head_dim, capability = padded(call.head_dim), support.gpu(call.query.device).capability
    asynchronous = _has_asynchronous_products(capability)
    # Numbers of 8 bits take registers until they are widened, and older products take theirs from registers.
    if rows < _MAX_ROWS or head_dim > (64 if call.rounded else 128) * (2 if asynchronous else 1):
        return _small_tiles(call, max(group_rows, min(rows, 64)))
    if not asynchronous:
        # 100 KiB of shared memory on all but Ampere's largest.
        keys = 64 if head_dim <= 64 or capability == 80 else 32
    elif head_dim > 128:
        keys = 32
    else:
        keys = 64 if call.rounded or (head_dim > 64 and call.sliding_window is not None) else 128
    return Tiles(rows, keys, num_warps=8, num_stages=5)


def _small_tiles(call: Call, rows: int) -> Tiles:
    """Between the two; as few keys and as many warps as it takes to keep everything in registers and in 100 KiB of shared memory."""
    capability = support.gpu(call.query.device).capability
    asynchronous = _has_asynchronous_products(capability)
    keys = 64 if call.head_dim <= 128 else 32 if asynchronous or capability == 80 else 16
    many_warps = call.rounded or (rows >= 64 and not asynchronous)
    return Tiles(rows, keys, num_warps=8 if many_warps else 4, num_stages=5)


def _has_asynchronous_products(capability: int) -> bool:
    """Hopper and Blackwell for data centres, which also have the shared memory for more keys."""
    return 90 <= capability < 120


def padded(head_dim: int) -> int:
    """Columns of a tile: a power of two, and at least what a product takes."""
    columns: int = triton.next_power_of_2(head_dim)
    return max(16, columns)
