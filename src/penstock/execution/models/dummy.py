"""Random weights in the shape of a model, for measuring speed and memory without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Random numbers are slow to draw, so one buffer is drawn and copied on and on. Its length is a prime: no two rows of a weight are equal.
_BUFFER_LENGTH = 1_000_003
_STD = 0.02


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

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return torch.ones(shape, dtype=self._dtype) if _is_norm(name) else self.read_rows(name, 0, shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor that is no norm."""
        row_shape = self._shapes[name][1:]
        row = math.prod(row_shape)
        numbers = self._numbers(self._starts[name] + start * row, (stop - start) * row)
        return numbers.view(stop - start, *row_shape)

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
