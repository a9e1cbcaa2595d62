"""Random ids: 128 bits that nobody can guess, as text. Taken from the system's generator in pieces of a page, because a system call for
every id costs more than the id."""

from __future__ import annotations

import os

_ID_BYTES = 16
_PAGE_IDS = 256


class RandomIds:
    """A source of ids for one process; not to be shared over a fork or between threads."""

    def __init__(self) -> None:
        self._page: list[str] = []

    def take(self) -> str:
        """32 hexadecimal digits, never given out before."""
        if not self._page:
            digits = os.urandom(_ID_BYTES * _PAGE_IDS).hex()
            step = 2 * _ID_BYTES
            self._page = [digits[start : start + step] for start in range(0, len(digits), step)]
        return self._page.pop()
