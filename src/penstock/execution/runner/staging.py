"""What the host sends to the device for a step, packed into one piece of pinned memory and copied once.

    [ rows: slots | starts | query_start | … ][ token ids and block ids ][ runs ][ what else a step needs ]
      always at the same place                  as far as they fit

There is one piece more than steps may be in flight. A piece is written to again when the device has copied it, which with steps taken in
order is always so by then: nobody waits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.runner.accelerator import Accelerator, Mark

# Numbers of tokens and blocks that a step carries; what is beyond, such as many long prompts at once, is copied on its own.
DATA_SIZE = 1 << 20
# Most sections that `put` is asked for in a step: each may leave a gap behind it.
_MAX_SECTIONS = 8
# Sections begin at multiples of 16 bytes, so that kernels are compiled for one kind of address.
_ALIGNMENT = 4


class Section(NamedTuple):
    """Numbers [start, start + size) of the packed memory."""

    start: int
    size: int


class StagingBuffer:
    """Pinned memory for one step's numbers, and the mark behind the step that was sent last."""

    def __init__(self, accelerator: Accelerator, size: int) -> None:
        self.pinned = accelerator.pinned((size,), torch.int32)
        self.numbers: npt.NDArray[np.int32] = self.pinned.numpy()
        self.used = 0
        self.mark: Mark | None = None


class Staging:
    """A ring of pinned buffers and the device's one copy, int32 [size]. Work on the device goes one step after the other, so that one copy
    is enough there.

    fixed_size: what `begin` sets apart at the beginning; data_size: room for numbers whose number has no bound that is worth having memory
    for: of these the caller puts as many as there is `data_room` for; other_size: what else may be put in a step.
    """

    def __init__(
        self, accelerator: Accelerator, *, fixed_size: int, other_size: int, depth: int, data_size: int = DATA_SIZE
    ) -> None:
        self._accelerator = accelerator
        self._fixed_size = aligned(fixed_size)
        self._data_end = self._fixed_size + aligned(data_size)
        size = self._data_end + other_size + _MAX_SECTIONS * _ALIGNMENT
        self._ring = [StagingBuffer(accelerator, size) for _ in range(depth)]
        self._next = 0
        self._buffer = self._ring[0]
        self.device = torch.zeros(size, dtype=torch.int32, device=accelerator.device)

    def begin(self) -> npt.NDArray[np.int32]:
        """Begin to pack a step; returns its fixed part, for the caller to fill."""
        self._buffer = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        if self._buffer.mark is not None:
            self._buffer.mark.wait()
            self._buffer.mark = None
        self._buffer.used = self._fixed_size
        return self._buffer.numbers[: self._fixed_size]

    @property
    def data_room(self) -> int:
        """How many numbers without a bound there is room for."""
        return self._data_end - self._buffer.used

    def put_data(self, numbers: npt.ArrayLike) -> Section | Tensor:
        """Pack any number of numbers, flattened. What there is no room for is on the device at once; the host waits for that."""
        values = np.asarray(numbers, dtype=np.int32).reshape(-1)
        if len(values) > self.data_room:
            return torch.from_numpy(values).to(self.device.device)
        return self.put(values)

    def put(self, numbers: npt.ArrayLike) -> Section:
        """Pack numbers, flattened."""
        buffer, values = self._buffer, np.asarray(numbers, dtype=np.int32).reshape(-1)
        section = Section(buffer.used, len(values))
        if section.start + section.size > len(buffer.numbers):
            raise IntegrityError(
                f"a step sends {section.start + section.size} numbers; there is room for {len(buffer.numbers)}"
            )
        buffer.numbers[section.start : section.start + section.size] = values
        buffer.used += aligned(section.size)
        return section

    def send(self) -> None:
        """Queue the one copy."""
        used = self._buffer.used
        self._accelerator.send(self._buffer.pinned[:used], self.device[:used])

    def sent(self, mark: Mark) -> None:
        """`mark` is behind the copy of this step."""
        self._buffer.mark = mark

    def view(self, packed: Section | Tensor) -> Tensor:
        """What was packed, on the device, int32 [size], for work of this step."""
        if isinstance(packed, Tensor):
            return packed
        return self.device[packed.start : packed.start + packed.size]


def aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
