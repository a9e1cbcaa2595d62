"""Random weights in the shape of a model, for measuring speed and memory without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from penstock.execution.parallel.sharding import WHOLE, Shard

# Random numbers are slow to draw, so one buffer is drawn and copied on and on. Its length is a prime: no two rows of a weight are equal.
_BUFFER_LENGTH = 1_000_003
_STD = 0.02
# Numbers of which columns are taken at a time.
_CUT_AT_ONCE = 1 << 20


class DummySource:
    """A WeightSource of normal numbers of standard deviation 0.02, the same for the same seed; norms are ones.

    shapes: of all tensors, by name. dtype: the type in which a checkpoint would store them.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._buffer = torch.empty(_BUFFER_LENGTH).normal_(std=_STD, generator=generator).to(dtype)
        self._starts: dict[str, int] = {}
        position = 0
        for name, shape in self._shapes.items():
            self._starts[name] = position
            if not _is_norm(name):
                position += math.prod(shape)

    def names(self) -> Sequence[str]:
        """In the order in which they were given."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def nbytes(self, name: str) -> int:
        """As if it came from a disk."""
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    def where(self, name: str) -> str:
        return f"random numbers of seed {self._seed}: tensor {name!r}"

    def read(self, name: str, shard: Shard = WHOLE) -> Tensor:
        """The numbers that the shard has in the whole tensor."""
        shape = self._shapes[name]
        if _is_norm(name):
            return torch.ones(shard.shape(shape), dtype=self._dtype)
        start, stop = shard.rows or (0, shape[0])
        columns = None if len(shape) < 2 else shard.columns
        if columns is None:
            return self.read_rows(name, start, stop)
        part = torch.empty(shard.shape(shape), dtype=self._dtype)
        step = max(1, _CUT_AT_ONCE // max(1, math.prod(shape[1:])))
        for row in range(start, stop, step):
            end = min(stop, row + step)
            part[row - start : end - start] = self.read_rows(name, row, end, columns)
        return part

    def read_rows(self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> Tensor:
        """Rows [start, stop) of a tensor that is no norm, and of them the columns [start, stop); None: all."""
        row_shape = self._shapes[name][1:]
        row = math.prod(row_shape)
        numbers = self._numbers(self._starts[name] + start * row, (stop - start) * row)
        rows = numbers.view(stop - start, *row_shape)
        return rows if columns is None else rows[:, columns[0] : columns[1]]

    def _numbers(self, start: int, count: int) -> Tensor:
        """Numbers [start, start + count) of the endlessly repeated buffer."""
        numbers = torch.empty(count, dtype=self._dtype)
        position, offset = 0, start % _BUFFER_LENGTH
        while position < count:
            piece = min(count - position, _BUFFER_LENGTH - offset)
            numbers[position : position + piece] = self._buffer[offset : offset + piece]
            position, offset = position + piece, 0
        return numbers


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")
