"""The coordinator: one process that holds the shared state of several gateway workers when there is no Redis.

It is a process of its own, not a part of the parent's: what grows with the load (cache, flights, windows) then cannot take the parent
with it, which watches the engine and the workers. When it dies the parent starts it again, empty, and until then the workers do what
their failure policies say. Its socket lies in a directory that only this user can enter.

What does not belong here: how limits are counted (limits/), how answers are kept (cache/), how the process is started (cluster/).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import msgspec

from penstock.core.errors import PenstockError
from penstock.core.framing import FrameError, frame, read_frame
from penstock.serving.gateway.cache.interface import CacheStore, FlightStore, Log
from penstock.serving.gateway.limits.interface import LimitStore
from penstock.serving.gateway.stores.protocol import (
    MAX_FRAME_BYTES,
    Admit,
    CacheGet,
    CachePut,
    Call,
    FlightAbandon,
    FlightAppend,
    FlightClaim,
    FlightFinish,
    FlightRead,
    Operation,
    Ping,
    Renew,
    Reply,
    Settle,
)

logger = logging.getLogger(__name__)

# Reads that may wait at once for one worker; more get an error.
MAX_WAITING_READS = 8192
# A reply with chunks of a log stays well below a frame; the reader asks again for the rest.
MAX_LOG_BYTES = MAX_FRAME_BYTES // 4
_NOTHING = msgspec.Raw(msgspec.msgpack.encode(None))


class CoordinatorServer:
    """Serves three stores on a Unix socket. Owns the stores: `close` closes them."""

    def __init__(self, limits: LimitStore, cache: CacheStore, flights: FlightStore) -> None:
        self._limits = limits
        self._cache = cache
        self._flights = flights
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, path: Path) -> None:
        """Listen on `path`; a socket that a predecessor left there is replaced."""
        path.unlink(missing_ok=True)  # noqa: ASYNC240  once, before anybody waits
        self._server = await asyncio.start_unix_server(self._connected, path)

    async def close(self) -> None:
        """Stop listening, end the connections, close the stores. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        for store in (self._limits, self._cache, self._flights):
            await store.close()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(_Connection(self, writer), reader), name="coordinator-connection")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        try:
            await connection.run(reader)
        except (OSError, FrameError, msgspec.MsgspecError, PenstockError) as error:
            logger.warning("lost the connection to a gateway worker: %s", error)
        finally:
            await connection.close()

    async def carry_out(self, operation: Operation) -> object:
        """What the store's method returns."""
        match operation:
            case Admit(reservation):
                return await self._limits.admit(reservation)
            case Settle(reservation, tokens):
                await self._limits.settle(reservation, tokens)
            case Renew(reservations):
                await self._limits.renew(reservations)
            case CacheGet(key):
                return await self._cache.get(key)
            case CachePut(key, entry, ttl_s):
                await self._cache.put(key, entry, ttl_s)
            case FlightClaim(key, owner, lease_s):
                return await self._flights.claim(key, owner, lease_s)
            case FlightAppend(key, owner, chunk, lease_s):
                return await self._flights.append(key, owner, chunk, lease_s)
            case FlightFinish(key, owner, chunk, keep_s):
                await self._flights.finish(key, owner, chunk, keep_s)
            case FlightAbandon(key, owner):
                await self._flights.abandon(key, owner)
            case FlightRead(key, position, wait_s):
                return _beginning(await self._flights.read(key, position, wait_s))
            case Ping():
                pass
        return None


class _Connection:
    """One worker. Its reads that wait are tasks; everything else is carried out at once, in order."""

    def __init__(self, server: CoordinatorServer, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._writer = writer
        self._reads: set[asyncio.Task[None]] = set()
        self._decoder = msgspec.msgpack.Decoder(Call)
        self._encoder = msgspec.msgpack.Encoder()

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Answer calls until the worker leaves. Raises when the stream cannot be understood."""
        while (message := await read_frame(reader, MAX_FRAME_BYTES)) is not None:
            call = self._decoder.decode(message)
            if not isinstance(call.operation, FlightRead):
                await self._answer(call)
            elif len(self._reads) < MAX_WAITING_READS:
                task = asyncio.create_task(self._answer(call))
                self._reads.add(task)
                task.add_done_callback(self._reads.discard)
            else:
                self._write(Reply(call.call_id, _NOTHING, "too many reads wait"))
            # A worker that does not take its answers is not read from.
            await self._writer.drain()

    async def close(self) -> None:
        for task in self._reads:
            task.cancel()
        await asyncio.gather(*self._reads, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):  # a connection that broke is closed too
            await self._writer.wait_closed()

    async def _answer(self, call: Call) -> None:
        try:
            result = msgspec.Raw(self._encoder.encode(await self._server.carry_out(call.operation)))
            self._write(Reply(call.call_id, result))
        # One operation that fails must not end the others' connection; the worker learns that it failed.
        except Exception as error:
            logger.exception("an operation of a gateway worker failed: %s", type(call.operation).__name__)
            self._write(Reply(call.call_id, _NOTHING, type(error).__name__))

    def _write(self, reply: Reply) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame(self._encoder.encode(reply), MAX_FRAME_BYTES))


def _beginning(log: Log) -> Log:
    """As many chunks as fit into a reply. What is cut off is still to come, so the log then counts as running."""
    size = 0
    for number, chunk in enumerate(log.chunks):
        size += len(chunk)
        if size > MAX_LOG_BYTES and number > 0:
            return Log(log.chunks[:number], "running")
    return log
