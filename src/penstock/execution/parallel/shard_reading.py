"""Reads the bytes of a shard from a file, and as few others as pay off.

Rows of a matrix lie together and are one read. Columns are a piece of each row: with rows of 8 KiB and more every piece is a read of its
own, so that about the pieces' bytes come from the disk, in whole pages of 4 KiB; shorter rows have no page to leave out, and are read
whole, many at a time. Pieces are announced to the system some time before they are read, so that the disk always has several to fetch:
cold reads of half of each row of 16 KiB became seven times as fast with that, and twice as fast as reading whole rows.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Rows of which a part is skipped on the way are at least this long.
_SKIPPED_FROM = 8192
# Whole rows that are read at a time, of which a part is thrown away.
_READ_AT_ONCE = 1 << 20
# Rows whose pieces are announced before they are read.
_ANNOUNCED = 64


def read_pieces(descriptor: int, target: Tensor, first: int, stride: int) -> None:
    """Fill `target`, contiguous, any type [rows, …], with one piece of the file for each row: the first from byte `first` on, every other
    `stride` bytes after the one before.

    Raises EOFError when the file ends before the last of them does.
    """
    if not target.numel():
        return
    pieces = target.view(len(target), -1).view(torch.uint8)
    rows, length = pieces.shape
    if length == stride or rows == 1:
        _read(descriptor, pieces, first)
    elif stride < _SKIPPED_FROM:
        _read_whole_rows(descriptor, pieces, first, stride)
    else:
        _read_single_pieces(descriptor, pieces, first, stride)


def _read_whole_rows(descriptor: int, pieces: Tensor, first: int, stride: int) -> None:
    rows, length = pieces.shape
    step = max(1, _READ_AT_ONCE // stride)
    buffer = torch.empty(min(step, rows) * stride, dtype=torch.uint8)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        # What follows the last piece may be beyond the end of the file.
        read = buffer[: (count - 1) * stride + length]
        _read(descriptor, read, first + start * stride)
        pieces[start : start + count] = read.as_strided((count, length), (stride, 1))


def _read_single_pieces(descriptor: int, pieces: Tensor, first: int, stride: int) -> None:
    rows, length = pieces.shape
    announces = hasattr(os, "posix_fadvise")
    if announces:
        # Or the system would read on past every piece.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    memory = pieces.view(-1).numpy().data
    announced = 0
    for row in range(rows):
        if announces and announced < rows and announced - row < _ANNOUNCED // 2:
            until = min(rows, row + _ANNOUNCED)
            for ahead in range(announced, until):
                os.posix_fadvise(descriptor, first + ahead * stride, length, os.POSIX_FADV_WILLNEED)
            announced = until
        _read_into(descriptor, memory[row * length : (row + 1) * length], first + row * stride)


def _read(descriptor: int, target: Tensor, position: int) -> None:
    _read_into(descriptor, target.view(-1).numpy().data, position)


def _read_into(descriptor: int, target: memoryview, position: int) -> None:
    while target:
        count = os.preadv(descriptor, [target], position)
        if not count:
            raise EOFError
        target, position = target[count:], position + count
