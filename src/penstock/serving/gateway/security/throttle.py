"""Counts failed attempts to prove an identity, and says from when on a client has to wait.

Two counts per client address, both over a sliding minute: of one credential (a look-up id, whatever secret came with it), and of all of
them together. The first is smaller, and an attempt that it refuses does not count for the second: one broken program that repeats a
revoked key does not take the address from its neighbours behind the same NAT. No count is shared between addresses, so nobody can
lock a key out from afar. A success changes nothing. Every process counts for itself.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

WINDOW_S = 60.0
FAILURES_PER_ADDRESS = 60
FAILURES_PER_CREDENTIAL = 10
# Addresses remembered; those whose last failure is longest ago are forgotten first.
_MAX_ADDRESSES = 4096
_MAX_CREDENTIALS = 8192


class SlidingCounts:
    """Times of the last `limit` events of each of at most `max_keys` keys."""

    def __init__(self, limit: int, max_keys: int) -> None:
        self._limit = limit
        self._max_keys = max_keys
        self._times: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._times)

    def wait_s(self, key: Hashable, now: float) -> float:
        """Seconds until the key has fewer than `limit` events in the window; 0 when that is so now."""
        times = self._times.get(key)
        if times is None or len(times) < self._limit:
            return 0.0
        return max(0.0, times[0] + WINDOW_S - now)

    def add(self, key: Hashable, now: float) -> None:
        """One more event."""
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = deque(maxlen=self._limit)
            if len(self._times) > self._max_keys:
                self._times.popitem(last=False)
        times.append(now)
        self._times.move_to_end(key)


class FailureThrottle:
    """`address` is what `client_block` gives, None where the client has none (then nothing is counted: it would be shared by all
    such clients). `credential` tells credentials of one address apart; it is kept, so it must not be a secret."""

    def __init__(
        self,
        *,
        per_address: int = FAILURES_PER_ADDRESS,
        per_credential: int = FAILURES_PER_CREDENTIAL,
        max_addresses: int = _MAX_ADDRESSES,
        max_credentials: int = _MAX_CREDENTIALS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._addresses = SlidingCounts(per_address, max_addresses)
        self._credentials = SlidingCounts(per_credential, max_credentials)

    @property
    def remembered(self) -> int:
        """Entries held."""
        return len(self._addresses) + len(self._credentials)

    def wait_s(self, address: str | None, credential: Hashable) -> float:
        """Seconds until the next attempt is looked at; 0: now."""
        if address is None:
            return 0.0
        now = self._clock()
        return max(self._addresses.wait_s(address, now), self._credentials.wait_s((address, credential), now))

    def failed(self, address: str | None, credential: Hashable) -> None:
        """Note a failed attempt."""
        if address is None:
            return
        now = self._clock()
        self._addresses.add(address, now)
        self._credentials.add((address, credential), now)
