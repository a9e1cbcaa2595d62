"""What the gateway asks of the places where answers are kept and generations are shared: this process, the coordinator's, or Redis."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from penstock.serving.frontend.client import Delta

CacheOutcome = Literal["hit", "miss", "coalesced", "bypass"]
# A leader that does not renew its claim for so long has lost it.
CLAIM_S = 10.0


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A whole answer: one delta per choice, (number of the prompt, delta), in the order of the choices. `created_at`: Unix time."""

    created_at: float
    news: list[tuple[int, Delta]]


class CacheStore(Protocol):
    """Keeps entries. A store that fails is a miss: `get` then returns None, `put` does nothing; both count it."""

    async def get(self, key: str) -> Entry | None: ...

    async def put(self, key: str, entry: Entry, ttl_s: float) -> None: ...

    async def close(self) -> None: ...


class Log(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a generation's log. `state`: "running", "finished" (nothing follows `chunks`), or "gone": the leader lost its claim
    or gave up, and whoever waits may claim the key."""

    chunks: list[bytes]
    state: Literal["running", "finished", "gone"]


class FlightStore(Protocol):
    """One leader per key among all gateway processes, and the log that it writes for the others. Claims expire."""

    async def claim(self, key: str, owner: str, lease_s: float) -> bool:
        """True: the caller leads, with an empty log. False: another does."""
        ...

    async def append(self, key: str, owner: str, chunk: bytes, lease_s: float) -> bool:
        """Add to the log and renew the claim; an empty chunk only renews. False when the claim is lost."""
        ...

    async def finish(self, key: str, owner: str, chunk: bytes, keep_s: float) -> None:
        """Add the last chunk; the log stays readable for `keep_s` and the key can be claimed anew."""
        ...

    async def abandon(self, key: str, owner: str) -> None:
        """Give the claim back; readers see "gone"."""
        ...

    async def read(self, key: str, position: int, wait_s: float) -> Log:
        """The chunks from number `position` on; waits up to `wait_s` for one."""
        ...

    async def close(self) -> None: ...
