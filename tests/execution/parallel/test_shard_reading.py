"""Pieces of a file, and how many bytes are read for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.execution.parallel.shard_reading import read_pieces

READS = Path("/proc/self/io")


def bytes_read(action: Callable[[], object]) -> int:
    """What the system has given to this process meanwhile."""

    def counted() -> int:
        return int(READS.read_text().split()[1])

    overhead = -counted() + counted()
    before = counted()
    action()
    return counted() - before - overhead


def write(file: Path, rows: int, stride: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    content = np.random.default_rng(0).integers(0, 256, (rows, stride), dtype=np.uint8)
    file.write_bytes(content.tobytes())
    return content


# Short and long rows, some of them a few at a time, the piece at the start, in the middle and at the end of a row, and whole rows.
@pytest.mark.parametrize("stride", [48, 8192, 20_000])
@pytest.mark.parametrize("piece", [(0, 16), (16, 32), (32, 48), (0, 48)])
def test_pieces_of_rows(tmp_path: Path, stride: int, piece: tuple[int, int]) -> None:
    start, stop = (border * (stride // 48) // 16 * 16 if border < 48 else stride for border in piece)
    content = write(tmp_path / "rows", 200, stride)
    target = torch.empty(150, (stop - start) // 4, dtype=torch.float32)
    descriptor = os.open(tmp_path / "rows", os.O_RDONLY)
    try:
        read_pieces(descriptor, target, 30 * stride + start, stride)
        assert torch.equal(target.view(torch.uint8), torch.from_numpy(content[30:180, start:stop].copy()))
        # The last row's piece ends with the file.
        read_pieces(descriptor, target, 50 * stride + start, stride)
        assert torch.equal(target.view(torch.uint8), torch.from_numpy(content[50:, start:stop].copy()))
        with pytest.raises(EOFError):
            read_pieces(descriptor, target, 51 * stride + start, stride)
        read_pieces(descriptor, torch.empty(0, 5), 0, stride)
    finally:
        os.close(descriptor)


@pytest.mark.skipif(not READS.exists(), reason="the system does not say what was read")
@pytest.mark.parametrize(("stride", "share"), [(8192, 0.25), (64, 1.0)])
def test_of_long_rows_only_the_pieces_are_read(tmp_path: Path, stride: int, share: float) -> None:
    rows = 2**20 // stride
    write(tmp_path / "rows", rows, stride)
    target = torch.empty(rows, stride // 4, dtype=torch.uint8)
    descriptor = os.open(tmp_path / "rows", os.O_RDONLY)
    try:
        count = bytes_read(lambda: read_pieces(descriptor, target, 0, stride))
    finally:
        os.close(descriptor)
    assert count == pytest.approx(share * 2**20, rel=0.01)
