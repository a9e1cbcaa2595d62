"""Whole KV blocks from one place to another: all tensors of all layers in one launch.

A table has the address of every tensor, and the first dimension of each is the block, so the layout inside does not matter. Either side may
be pinned memory of the host, which a GPU reads and writes where it is. So moves to the host and back take their place in the
queue like any other work, and nobody waits for them. Each byte is read and written once, 16 bytes by a thread at a time; a
program has 8 KiB, so that one block of a model with 32 layers and 32 KiB per tensor is 256 programs, enough to fill the bus to the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# What a thread moves at once: addresses and sizes of blocks are multiples of it, in bytes.
ALIGNMENT = 16
# Numbers of 4 bytes.
_BLOCK = 2048


def move_blocks(sources: Tensor, targets: Tensor, block_sizes: Tensor, largest: int, moves: Tensor) -> None:
    """Copy block `moves[i, 0]` of each source to block `moves[i, 1]` of the target at its place in the table. No block is both.

    sources, targets: int64 [N], addresses of tensors; block_sizes: int32 [N], bytes of a block of each, divided by ALIGNMENT; largest: the
    largest of these; moves: int32 [M, 2]. All of them on the device.
    """
    grid = (len(moves), len(sources), triton.cdiv(largest * ALIGNMENT, 4 * _BLOCK))
    _move_kernel[grid](sources, targets, block_sizes, moves, BLOCK=_BLOCK, num_warps=8)


def move_blocks_twin(sources: list[Tensor], targets: list[Tensor], moves: Tensor) -> None:
    """`move_blocks` in torch's operators, for the tensors themselves."""
    for source, target in zip(sources, targets, strict=True):
        for here, there in moves.tolist():
            target[there] = source[here]


@triton.jit
def _move_kernel(sources, targets, block_sizes, moves, BLOCK: tl.constexpr):
    move = tl.program_id(0)
    tensor = tl.program_id(1)
    # What is loaded from a table has no known alignment; that blocks are multiples of 16 bytes is in the arithmetic.
    source = tl.load(sources + tensor).to(tl.pointer_type(tl.int32))
    target = tl.load(targets + tensor).to(tl.pointer_type(tl.int32))
    size = tl.load(block_sizes + tensor).to(tl.int64) * 4
    here = tl.load(moves + 2 * move) * size
    there = tl.load(moves + 2 * move + 1) * size
    index = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    values = tl.load(tl.multiple_of(source + here, 16) + index, mask=inside)
    tl.store(tl.multiple_of(target + there, 16) + index, values, mask=inside)
