"""What happens to limits while the store that gateways share (Redis, or the coordinator) is away.

- `closed`: requests get 503 with Retry-After.
- `open`: requests pass uncounted; answers carry no x-ratelimit headers.
- `local`: this process counts on its own. It begins with empty windows, and so does a Redis that lost its memory: a window may admit up to
  twice its limit per outage, times the number of gateway processes.

The store itself fails at once while its circuit is open, so no request waits; when it is back the next request is counted there.
"""

from __future__ import annotations

from typing import Literal

from penstock.core.errors import StoreUnavailableError
from penstock.serving.gateway.limits.interface import LimitStore, Reservation, Verdict
from penstock.serving.gateway.limits.local_store import LocalLimitStore

FailurePolicy = Literal["closed", "open", "local"]


class FallbackLimitStore:
    """LimitStore over `shared` with a policy for its failures. Owns both stores.

    A request is settled where it was admitted. What was admitted in the shared store and ends while that is away raises
    StoreUnavailableError, and can be settled later.
    """

    def __init__(self, shared: LimitStore, policy: FailurePolicy, *, local: LocalLimitStore | None = None) -> None:
        self._shared = shared
        self._policy = policy
        self._local = LocalLimitStore() if local is None else local

    async def admit(self, reservation: Reservation) -> Verdict:
        try:
            return await self._shared.admit(reservation)
        except StoreUnavailableError:
            if self._policy == "closed":
                raise
        if self._policy == "local":
            return await self._local.admit(reservation)
        return Verdict(True)

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        store = self._local if self._local.knows(reservation.request_id) else self._shared
        await store.settle(reservation, tokens)

    async def renew(self, reservations: list[Reservation]) -> None:
        here = [reservation for reservation in reservations if self._local.knows(reservation.request_id)]
        await self._local.renew(here)
        there = [reservation for reservation in reservations if not self._local.knows(reservation.request_id)]
        if there:
            await self._shared.renew(there)

    async def close(self) -> None:
        await self._shared.close()
        await self._local.close()
