"""Per-request rows of a device tensor, taken only by the requests that need them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class SlotTable:
    """A [rows, width] tensor whose rows belong to slots of the batch.

    Rows are given out on demand and zeroed; the tensor doubles when it is full (never above `max_slots` rows) and is released
    when the last row is given back.

    data: the tensor; valid until the next `acquire` or `release`.
    rows: int64 [max_slots], the row of each slot, -1 without one.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, max_slots: int) -> None:
        self._max_slots = max_slots
        self._free: list[int] = []
        self.data = torch.zeros((0, width), dtype=dtype, device=device)
        self.rows: npt.NDArray[np.int64] = np.full(max_slots, -1, dtype=np.int64)

    def acquire(self, slot: int) -> Tensor:
        """Give `slot` a row of zeros and return a view of it. A row that it already has is zeroed."""
        row = int(self.rows[slot])
        if row < 0:
            if not self._free:
                self._grow()
            row = self._free.pop()
            self.rows[slot] = row
        return self.data[row].zero_()

    def release(self, slot: int) -> None:
        """Take the row of `slot` back; nothing happens without one."""
        row = int(self.rows[slot])
        if row < 0:
            return
        self.rows[slot] = -1
        self._free.append(row)
        if len(self._free) == len(self.data):
            self._free = []
            self.data = self.data.new_zeros((0, self.data.shape[1]))

    def select(self, slots: npt.NDArray[np.int64]) -> Tensor:
        """Copies of the rows of `slots`, all of which have one: [len(slots), width]."""
        return self.data[torch.from_numpy(self.rows[slots]).to(self.data.device)]

    def _grow(self) -> None:
        old = len(self.data)
        new = min(max(2 * old, 4), self._max_slots)
        data = self.data.new_zeros((new, self.data.shape[1]))
        data[:old] = self.data
        self.data = data
        self._free = list(range(new - 1, old - 1, -1))
