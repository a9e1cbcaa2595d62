"""What the parent of several gateway workers and its children say to each other: typed msgpack in frames over a Unix socket pair.

    parent ─ Begin ─▶ child ─ Started ─▶ parent      the child inherited its end as a file descriptor
           ─ EngineReady, EngineLost, EngineGone ─▶
           ◀─ LimitsSet ─           ─ LimitsSet ─▶
           ─ Drain, Hurry ─▶
           ◀─ Beat (once a second), EngineHung ─
           ◀─ Scrape(id) ─          ─ Merged(id) ─▶   one page of metrics for all of them
           ─ Collect(id) ─▶         ◀─ Collected(id) ─

Settings travel here and not on the command line, where every user of the machine could read the passwords in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, Generic, TypeVar

import msgspec

from penstock.core.framing import frame, read_frame
from penstock.core.types import LiveLimits
from penstock.telemetry.aggregate import Snapshot

MAX_FRAME_BYTES = 16 * 2**20
BEAT_INTERVAL_S = 1.0


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The child's settings, as the composition root writes and reads them."""

    settings: dict[str, Any]


class EngineReady(msgspec.Struct, frozen=True, tag="engine_ready"):
    """An engine listens at `address`. `starts`: how many engines there were, this one included."""

    address: str
    starts: int


class EngineLost(msgspec.Struct, frozen=True, tag="engine_lost"):
    reason: str


class EngineGone(msgspec.Struct, frozen=True, tag="engine_gone"):
    reason: str


class LimitsSet(msgspec.Struct, frozen=True, tag="limits_set"):
    """Both ways: somebody set live limits on one worker; every worker gives them to the next engine."""

    limits: LiveLimits


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Finish what runs and exit. `linger`: accept for a while yet, load balancers lag."""

    linger: bool = False


class Hurry(msgspec.Struct, frozen=True, tag="hurry"):
    """Exit without waiting for what runs."""


class Collect(msgspec.Struct, frozen=True, tag="collect"):
    """Answer with Collected."""

    call_id: int


class Merged(msgspec.Struct, frozen=True, tag="merged"):
    """The metrics of all processes; the answer to Scrape."""

    call_id: int
    snapshot: Snapshot


ToChild = Begin | EngineReady | EngineLost | EngineGone | LimitsSet | Drain | Hurry | Collect | Merged


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The child serves."""


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    """The child cannot start; `message` is one line with the fix."""

    message: str


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A sign of life every BEAT_INTERVAL_S, with what would be lost if it were the last. `finished_requests`: that ended well."""

    finished_requests: int
    snapshot: Snapshot


class Collected(msgspec.Struct, frozen=True, tag="collected"):
    call_id: int
    snapshot: Snapshot


class Scrape(msgspec.Struct, frozen=True, tag="scrape"):
    """Answer with Merged."""

    call_id: int


class EngineHung(msgspec.Struct, frozen=True, tag="engine_hung"):
    """The engine at `address` makes no progress."""

    address: str
    reason: str


ToParent = Started | StartFailed | Beat | Collected | Scrape | EngineHung | LimitsSet

Incoming = TypeVar("Incoming")


class ControlChannel(Generic[Incoming]):
    """One end. Made by `open`; used from one event loop."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: msgspec.msgpack.Decoder[Incoming]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    async def open(cls, sock: socket.socket, incoming: Any) -> ControlChannel[Incoming]:
        """Take over `sock`. `incoming`: the union of messages that the other end sends."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer, msgspec.msgpack.Decoder(incoming))

    def send(self, message: ToChild | ToParent) -> None:
        """Hand over `message`; never waits. What the other end cannot take any more is dropped: a peer that left `MAX_FRAME_BYTES` unread
        hangs, and is noticed by its silence. Raises FrameError above the bound of a frame."""
        transport = self._writer.transport
        if not transport.is_closing() and transport.get_write_buffer_size() <= MAX_FRAME_BYTES:
            self._writer.write(frame(self._encoder.encode(message), MAX_FRAME_BYTES))

    async def receive(self) -> Incoming | None:
        """The next message; None when the other end is gone. Raises FrameError, msgspec.MsgspecError, OSError."""
        message = await read_frame(self._reader, MAX_FRAME_BYTES)
        return None if message is None else self._decoder.decode(message)

    async def close(self) -> None:
        """Let what was sent leave, then close."""
        self._writer.close()
        with contextlib.suppress(OSError):  # the other end is gone
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Close at once."""
        self._writer.transport.abort()
