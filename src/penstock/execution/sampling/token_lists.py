"""Lists of tokens with a number each, one per slot of the batch: what penalties and biases know of a request.

They are as long as the tokens that they concern, not as the vocabulary, and lie where native kernels can read them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int32]
ValueArray = npt.NDArray[np.float32]

_NO_IDS: IdArray = np.zeros(0, dtype=np.int32)
_NO_VALUES: ValueArray = np.zeros(0, dtype=np.float32)


class TokenLists:
    """One list per slot, empty at first.

    records: TOKEN_LIST (kernels/sampling.py), one per slot, kept up to date: addresses and lengths of the lists.
    """

    def __init__(self, records: npt.NDArray[np.void]) -> None:
        self._ids: list[IdArray] = [_NO_IDS] * len(records)
        self._values: list[ValueArray] = [_NO_VALUES] * len(records)
        self._places: list[dict[int, int] | None] = [None] * len(records)
        self._id_addresses = records["ids"]
        self._value_addresses = records["values"]
        self._counts = records["count"]

    def ids(self, slot: int) -> IdArray:
        """The tokens of a slot; a view."""
        return self._ids[slot][: self._counts[slot]]

    def values(self, slot: int) -> ValueArray:
        """Their numbers; a view."""
        return self._values[slot][: self._counts[slot]]

    def set(self, slot: int, ids: npt.ArrayLike, values: npt.ArrayLike) -> None:
        """Replace a slot's list: distinct token ids, as many numbers."""
        self._store(slot, np.array(ids, dtype=np.int32), np.array(values, dtype=np.float32))
        self._counts[slot] = len(self._ids[slot])
        self._places[slot] = None

    def clear(self, slot: int) -> None:
        """Make a slot's list empty and release its memory."""
        if self._counts[slot]:
            self.set(slot, _NO_IDS, _NO_VALUES)

    def add_one(self, slot: int, token_id: int) -> None:
        """Add 1 to the number of a token, which enters the list with 1 when it was not there."""
        places = self._places[slot]
        if places is None:
            places = self._places[slot] = {known: place for place, known in enumerate(self.ids(slot).tolist())}
        place = places.get(token_id)
        if place is not None:
            self._values[slot][place] += 1.0
            return
        count = places[token_id] = len(places)
        if count == len(self._ids[slot]):
            room = max(16, 2 * count)
            self._store(slot, np.resize(self._ids[slot], room), np.resize(self._values[slot], room))
        self._ids[slot][count] = token_id
        self._values[slot][count] = 1.0
        self._counts[slot] = count + 1

    def _store(self, slot: int, ids: IdArray, values: ValueArray) -> None:
        self._ids[slot], self._values[slot] = ids, values
        self._id_addresses[slot], self._value_addresses[slot] = ids.ctypes.data, values.ctypes.data
