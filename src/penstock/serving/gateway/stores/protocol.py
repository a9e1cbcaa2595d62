"""What gateway workers and their coordinator say to each other: typed msgpack in frames (core.framing) over a Unix socket.

    worker ─ Call(id, operation) ─▶ coordinator
           ◀─ Reply(id, result | error) ─

Calls are pipelined: those of one connection are carried out in the order in which they came, except that a FlightRead which waits lets
the others pass. The result of an operation has the type that the store's method returns (limits/interface, cache/interface).
"""

from __future__ import annotations

import msgspec

from penstock.serving.gateway.cache.interface import Entry
from penstock.serving.gateway.limits.interface import Reservation

MAX_FRAME_BYTES = 32 * 2**20


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """Answered with nothing."""


class Admit(msgspec.Struct, frozen=True, array_like=True, tag="admit"):
    reservation: Reservation


class Settle(msgspec.Struct, frozen=True, array_like=True, tag="settle"):
    reservation: Reservation
    tokens: int


class Renew(msgspec.Struct, frozen=True, array_like=True, tag="renew"):
    reservations: list[Reservation]


class CacheGet(msgspec.Struct, frozen=True, array_like=True, tag="get"):
    key: str


class CachePut(msgspec.Struct, frozen=True, array_like=True, tag="put"):
    key: str
    entry: Entry
    ttl_s: float


class FlightClaim(msgspec.Struct, frozen=True, array_like=True, tag="claim"):
    key: str
    owner: str
    lease_s: float


class FlightAppend(msgspec.Struct, frozen=True, array_like=True, tag="append"):
    key: str
    owner: str
    chunk: bytes
    lease_s: float


class FlightFinish(msgspec.Struct, frozen=True, array_like=True, tag="finish"):
    key: str
    owner: str
    chunk: bytes
    keep_s: float


class FlightAbandon(msgspec.Struct, frozen=True, array_like=True, tag="abandon"):
    key: str
    owner: str


class FlightRead(msgspec.Struct, frozen=True, array_like=True, tag="read"):
    key: str
    position: int
    wait_s: float


Operation = (
    Ping
    | Admit
    | Settle
    | Renew
    | CacheGet
    | CachePut
    | FlightClaim
    | FlightAppend
    | FlightFinish
    | FlightAbandon
    | FlightRead
)


class Call(msgspec.Struct, frozen=True, array_like=True):
    """`call_id` is the worker's and unique on its connection."""

    call_id: int
    operation: Operation


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """`result`: the operation's, encoded; without meaning when there is an `error`, which is for the log."""

    call_id: int
    result: msgspec.Raw
    error: str | None = None
