"""What the gateway asks of the place where limits are counted: this process, the coordinator's, or Redis. docs/accounting.md says
what is charged when.

All structs cross processes as msgpack. Times are seconds.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

WINDOW_S = 60.0
# A slot whose holder does not renew it for so long is free again.
LEASE_S = 15.0

LimitKind = Literal["requests", "tokens", "concurrency"]


class Subject(msgspec.Struct, frozen=True, array_like=True):
    """One whom limits are counted for: `name` is "key:<id>" or "tenant:<name>". None: not limited."""

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


class Reservation(msgspec.Struct, frozen=True, array_like=True):
    """One request: charged to every subject, or to none. `tenant` is the hash tag that keeps its counters on one Redis node.
    `tokens` are reserved and settled later; never above a subject's limit (the limiter refuses that before)."""

    request_id: str
    tenant: str
    subjects: list[Subject]
    tokens: int


class Window(msgspec.Struct, frozen=True, array_like=True):
    """State of one limit after the decision. `reset_s`: until the window is empty again if nothing more comes."""

    limit: int
    remaining: int
    reset_s: float


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """The decision. When refused: by which limit of which subject, and after how many seconds the same request would pass if nobody
    else used this subject (0 for concurrency: nobody knows). `requests` and `tokens`: the tightest window of each, None
    without such a limit."""

    allowed: bool
    refused_by: LimitKind | None = None
    subject: str = ""
    retry_after_s: float = 0.0
    requests: Window | None = None
    tokens: Window | None = None


class LimitStore(Protocol):
    """Counts. Every operation is atomic over all subjects of its reservation; a refused request leaves no trace."""

    async def admit(self, reservation: Reservation) -> Verdict:
        """Charge one request and its tokens and take a slot, or refuse."""
        ...

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        """Replace the reserved tokens by those used, at the time of admission, and give the slot back. Idempotent."""
        ...

    async def renew(self, reservations: list[Reservation]) -> None:
        """Keep the slots of requests that still run."""
        ...

    async def close(self) -> None: ...
