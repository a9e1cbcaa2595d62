"""The workers' side of the coordinator: a connection with a time-out and a circuit breaker, and the three stores over it.

An operation that cannot be carried out raises StoreUnavailableError; the policy is the caller's (a cache that fails is a miss). After a
failure the circuit is open: operations fail at once until a new connection stands. One log line says that the coordinator is away and
one that it is back, whatever the number of requests between.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from pathlib import Path
from typing import TypeVar

import msgspec

from penstock.core.errors import StoreUnavailableError
from penstock.core.framing import FrameError, frame, read_frame
from penstock.serving.gateway.cache.interface import Entry, Log
from penstock.serving.gateway.limits.interface import Reservation, Verdict
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
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

T = TypeVar("T")
STORE = "coordinator"
# A local process answers in well under a millisecond; one that does not for so long counts as away.
TIMEOUT_S = 1.0
RECONNECT_INTERVAL_S = 0.1
# Calls without an answer, and bytes that the socket has not taken; above either the coordinator counts as too busy.
MAX_PENDING_CALLS = 16_384
MAX_UNSENT_BYTES = 2 * MAX_FRAME_BYTES

_AWAY = "The server's shared state is not available. Retry shortly."


class CoordinatorLink:
    """Used from one event loop. `start` before the first call, `close` at the end. `generation` counts how often the coordinator came
    back: what it kept is lost since."""

    def __init__(self, path: Path, recorder: Recorder, *, timeout_s: float = TIMEOUT_S) -> None:
        self.generation = 0
        self._path = path
        self._recorder = recorder
        self._timeout_s = timeout_s
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._closed = False
        self._calls: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._call_ids = itertools.count()
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def available(self) -> bool:
        """False while the circuit is open."""
        return self._writer is not None

    async def start(self) -> None:
        """Connect; a coordinator that is not there yet is looked for in the background."""
        try:
            await self._connect()
        except (OSError, TimeoutError, FrameError) as error:
            self._lose(error)

    async def close(self) -> None:
        """Leave; what still waits fails. Idempotent."""
        self._closed = True
        tasks = [task for task in (self._reading, self._reconnecting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._drop_connection()

    async def call(self, operation: Operation, result: type[T], purpose: str, *, wait_s: float = 0.0) -> T:
        """Carry out `operation`, which may wait in the coordinator for `wait_s`. Raises StoreUnavailableError."""
        writer = self._writer
        if writer is None:
            raise self._failed(purpose)
        if len(self._calls) >= MAX_PENDING_CALLS or writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise self._failed(purpose)
        call_id = next(self._call_ids)
        try:
            message = frame(self._encoder.encode(Call(call_id, operation)), MAX_FRAME_BYTES)
        except FrameError as error:
            logger.warning("not sent to the coordinator: %s", error)
            raise self._failed(purpose) from None
        answer: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        writer.write(message)
        try:
            async with asyncio.timeout(self._timeout_s + wait_s):
                return msgspec.msgpack.decode(await answer, type=result)
        except TimeoutError as error:
            # Others may have noticed before and connected again.
            if self._writer is writer:
                self._lose(error)
            raise self._failed(purpose) from None
        except StoreUnavailableError:
            raise self._failed(purpose) from None
        finally:
            self._calls.pop(call_id, None)

    def _failed(self, purpose: str) -> StoreUnavailableError:
        self._recorder.increment(metrics.STORE_ERRORS, STORE, purpose)
        return StoreUnavailableError(_AWAY)

    async def _connect(self) -> None:
        """A connection that has answered once. Raises OSError, TimeoutError, FrameError."""
        async with asyncio.timeout(self._timeout_s):
            reader, writer = await asyncio.open_unix_connection(self._path)
            try:
                writer.write(frame(self._encoder.encode(Call(next(self._call_ids), Ping())), MAX_FRAME_BYTES))
                if await read_frame(reader, MAX_FRAME_BYTES) is None:
                    raise ConnectionResetError("the coordinator closed the connection")
            # A connection that does not answer, or a cancelled attempt, must not stay open.
            except BaseException:
                writer.close()
                raise
        self._writer = writer
        self._reading = asyncio.create_task(self._read(reader, writer), name="coordinator-read")
        self._recorder.set(metrics.STORE_UP, 1, STORE)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = msgspec.msgpack.Decoder(Reply)
        reason: Exception = ConnectionResetError("the coordinator closed the connection")
        try:
            while (message := await read_frame(reader, MAX_FRAME_BYTES)) is not None:
                reply = decoder.decode(message)
                answer = self._calls.pop(reply.call_id, None)
                if answer is None or answer.done():
                    continue
                if reply.error is None:
                    answer.set_result(reply.result)
                else:
                    answer.set_exception(StoreUnavailableError(_AWAY))
        except (OSError, FrameError, msgspec.MsgspecError) as error:
            reason = error
        if self._writer is writer:
            self._lose(reason)

    def _lose(self, error: Exception) -> None:
        """Open the circuit and look for the coordinator in the background."""
        self._drop_connection()
        self._recorder.set(metrics.STORE_UP, 0, STORE)
        if self._reconnecting is None and not self._closed:
            logger.error(
                "the coordinator is away (%s: %s); stated failure policies apply until it answers",
                type(error).__name__,
                error,
            )
            self._reconnecting = asyncio.create_task(self._reconnect(), name="coordinator-reconnect")

    def _drop_connection(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.transport.abort()
        if self._reading is not None and self._reading is not asyncio.current_task():
            self._reading.cancel()
        calls, self._calls = self._calls, {}
        for answer in calls.values():
            if not answer.done():
                answer.set_exception(StoreUnavailableError(_AWAY))

    async def _reconnect(self) -> None:
        while True:
            await asyncio.sleep(RECONNECT_INTERVAL_S)
            with contextlib.suppress(OSError, TimeoutError, FrameError):
                await self._connect()
                break
        self.generation += 1
        self._reconnecting = None
        logger.warning("the coordinator is back")


class CoordinatorLimitStore:
    """LimitStore in the coordinator. Does not own the link."""

    def __init__(self, link: CoordinatorLink) -> None:
        self._link = link

    async def admit(self, reservation: Reservation) -> Verdict:
        return await self._link.call(Admit(reservation), Verdict, "limits")

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        await self._link.call(Settle(reservation, tokens), type(None), "limits")

    async def renew(self, reservations: list[Reservation]) -> None:
        await self._link.call(Renew(reservations), type(None), "limits")

    async def close(self) -> None:
        """Nothing to release."""


class CoordinatorCacheStore:
    """CacheStore in the coordinator: away is a miss. Does not own the link."""

    def __init__(self, link: CoordinatorLink) -> None:
        self._link = link

    async def get(self, key: str) -> Entry | None:
        try:
            return await self._link.call(CacheGet(key), Entry | None, "cache")  # type: ignore[arg-type]  # a union is no class
        except StoreUnavailableError:
            return None

    async def put(self, key: str, entry: Entry, ttl_s: float) -> None:
        with contextlib.suppress(StoreUnavailableError):  # the link has counted it
            await self._link.call(CachePut(key, entry, ttl_s), type(None), "cache")

    async def close(self) -> None:
        """Nothing to release."""


class CoordinatorFlightStore:
    """FlightStore in the coordinator. Every method raises StoreUnavailableError while it is away. Does not own the link."""

    def __init__(self, link: CoordinatorLink) -> None:
        self._link = link

    async def claim(self, key: str, owner: str, lease_s: float) -> bool:
        return await self._link.call(FlightClaim(key, owner, lease_s), bool, "flight")

    async def append(self, key: str, owner: str, chunk: bytes, lease_s: float) -> bool:
        return await self._link.call(FlightAppend(key, owner, chunk, lease_s), bool, "flight")

    async def finish(self, key: str, owner: str, chunk: bytes, keep_s: float) -> None:
        await self._link.call(FlightFinish(key, owner, chunk, keep_s), type(None), "flight")

    async def abandon(self, key: str, owner: str) -> None:
        await self._link.call(FlightAbandon(key, owner), type(None), "flight")

    async def read(self, key: str, position: int, wait_s: float) -> Log:
        return await self._link.call(FlightRead(key, position, wait_s), Log, "flight", wait_s=wait_s)

    async def close(self) -> None:
        """Nothing to release."""
