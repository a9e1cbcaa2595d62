"""Typed messages between frontends and an engine: msgpack over ZeroMQ, and an in-process twin with the same interface.

One engine serves several clients. Neither end blocks on the other: the engine's `send` reports a full client instead of waiting
(the caller keeps the news and merges it with the next), the client's `send` raises OverloadedError.

ZeroMQ sockets live in a directory that only this user can enter, so no other user of the machine can speak to the engine, and
nothing on the wire is ever unpickled: a message that does not decode into the declared types is dropped and logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import shutil
import tempfile
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import msgspec

from penstock.core.errors import ConfigError, OverloadedError, PenstockError
from penstock.core.types import Disconnect, FromEngine, ToEngine

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)

ClientId = bytes

# Messages (not bytes) that may wait in one direction for one peer.
SEND_QUEUE_LENGTH = 4096


class EngineEndpoint(Protocol):
    """The engine's end. Used from one thread."""

    def receive(self, timeout_s: float) -> list[tuple[ClientId, ToEngine]]:
        """All messages that are here; waits up to `timeout_s` for the first one (0: do not wait)."""
        ...

    def send(self, client: ClientId, message: FromEngine) -> bool:
        """Hand over `message`. False when the client's queue is full or the client is gone: nothing was sent."""
        ...

    def close(self) -> None: ...


class ClientEndpoint(Protocol):
    """A frontend's end. Used from one event loop."""

    def send(self, message: ToEngine) -> None:
        """Hand over `message`; never waits. Raises OverloadedError when the queue to the engine is full."""
        ...

    async def receive(self) -> FromEngine:
        """The next message. One caller at a time."""
        ...

    def close(self) -> None: ...


class ZmqEngineEndpoint:
    """ROUTER socket bound to `address` (ipc:// in a private directory). A client whose connection ended without Disconnect (its process was
    killed) is received as one that said it, once something was sent to it."""

    def __init__(self, address: str) -> None:
        import zmq

        self._zmq = zmq
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 500)
        self._socket.set(zmq.SNDHWM, SEND_QUEUE_LENGTH)
        self._socket.set(zmq.RCVHWM, SEND_QUEUE_LENGTH)
        # Without this a ROUTER silently drops what it cannot deliver.
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._unreachable: set[ClientId] = set()

    def receive(self, timeout_s: float) -> list[tuple[ClientId, ToEngine]]:
        messages: list[tuple[ClientId, ToEngine]] = [(client, Disconnect()) for client in self._unreachable]
        self._unreachable.clear()
        if timeout_s > 0 and not messages and not self._socket.poll(int(timeout_s * 1000) or 1):
            return messages
        while True:
            try:
                frames = self._socket.recv_multipart(self._zmq.NOBLOCK)
            except self._zmq.Again:
                return messages
            try:
                client, payload = frames
                messages.append((client, self._decoder.decode(payload)))
            # ValueError: not two frames. PenstockError: well-formed, but a struct's own check refuses the values.
            except (msgspec.MsgspecError, ValueError, PenstockError) as error:
                logger.error("dropped a message that does not decode: %s", error)

    def send(self, client: ClientId, message: FromEngine) -> bool:
        try:
            self._socket.send_multipart((client, self._encoder.encode(message)), self._zmq.NOBLOCK)
        except self._zmq.ZMQError as error:
            if error.errno == self._zmq.EHOSTUNREACH:
                self._unreachable.add(client)
            return False
        return True

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class ZmqClientEndpoint:
    """DEALER socket connected to `address`. The engine need not be there yet.

    The socket's file descriptor signals edges, not levels: any call on the socket, a send too, can consume the edge that announces
    an incoming message. So every send wakes the reader to look again, and the reader waits only after a receive that found nothing.
    """

    def __init__(self, address: str) -> None:
        import zmq

        self._zmq = zmq
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, SEND_QUEUE_LENGTH)
        self._socket.set(zmq.RCVHWM, SEND_QUEUE_LENGTH)
        self._socket.set(zmq.RECONNECT_IVL, 20)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def send(self, message: ToEngine) -> None:
        try:
            self._socket.send(self._encoder.encode(message), self._zmq.NOBLOCK)
        except self._zmq.Again as error:
            raise OverloadedError("The engine does not take messages at the moment; retry shortly.") from error
        finally:
            self._wake.set()

    async def receive(self) -> FromEngine:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.fileno(), self._wake.set)
        while True:
            self._wake.clear()
            try:
                payload = self._socket.recv(self._zmq.NOBLOCK)
            except self._zmq.Again:
                await self._wake.wait()
                continue
            try:
                return self._decoder.decode(payload)
            except (msgspec.MsgspecError, PenstockError) as error:
                logger.error("dropped a message that does not decode: %s", error)

    def close(self) -> None:
        if self._socket.closed:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._context.term()


class SocketDirectory:
    """A directory for ipc sockets that only this user can enter (mode 0700), removed with its contents by `close`.

    Socket paths are short (107 bytes on Linux), so it lives in the system's temporary directory, or in /tmp where that path is too long.
    """

    MAX_PATH_BYTES = 100

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        if len(bytes(base)) > self.MAX_PATH_BYTES - 40:
            base = Path("/tmp")  # noqa: S108  mkdtemp below makes a private folder inside it
        try:
            self.path = Path(tempfile.mkdtemp(prefix="penstock-", dir=base))
        except OSError as error:
            raise ConfigError(f"Cannot make a folder for sockets in {base}: {error}; set TMPDIR.") from error
        self._count = 0

    def new_address(self) -> str:
        """An address that was not used before, so that a late message of an old engine cannot reach a new one."""
        self._count += 1
        return f"ipc://{self.path}/engine-{self._count}"

    def close(self) -> None:
        """Remove the directory. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> SocketDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class InProcessTransport:
    """Both ends in one process: the engine's in a thread, the client's in an event loop. One client.

    Messages are the same immutable structs, handed over without encoding.
    """

    CLIENT = b"in-process"

    def __init__(self) -> None:
        self._to_engine: queue.Queue[ToEngine] = queue.Queue(SEND_QUEUE_LENGTH)
        self.engine = _InProcessEngineEndpoint(self)
        self.client = _InProcessClientEndpoint(self)


class _InProcessEngineEndpoint:
    def __init__(self, transport: InProcessTransport) -> None:
        self._transport = transport

    def receive(self, timeout_s: float) -> list[tuple[ClientId, ToEngine]]:
        messages: list[tuple[ClientId, ToEngine]] = []
        inbox = self._transport._to_engine
        with contextlib.suppress(queue.Empty):
            if timeout_s > 0:
                messages.append((self._transport.CLIENT, inbox.get(timeout=timeout_s)))
            while True:
                messages.append((self._transport.CLIENT, inbox.get_nowait()))
        return messages

    def send(self, client: ClientId, message: FromEngine) -> bool:
        return self._transport.client._offer(message)

    def close(self) -> None:
        """Nothing to release."""


class _InProcessClientEndpoint:
    def __init__(self, transport: InProcessTransport) -> None:
        self._transport = transport
        self._inbox: deque[FromEngine] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    def _offer(self, message: FromEngine) -> bool:
        if len(self._inbox) >= SEND_QUEUE_LENGTH:
            return False
        self._inbox.append(message)
        loop = self._loop
        if loop is not None:
            # The loop may close while the engine thread still reports; there is nobody left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._wake.set)
        return True

    def send(self, message: ToEngine) -> None:
        try:
            self._transport._to_engine.put_nowait(message)
        except queue.Full as error:
            raise OverloadedError("The engine does not take messages at the moment; retry shortly.") from error

    async def receive(self) -> FromEngine:
        self._loop = asyncio.get_running_loop()
        while not self._inbox:
            self._wake.clear()
            if self._inbox:
                break
            await self._wake.wait()
        return self._inbox.popleft()

    def close(self) -> None:
        self._loop = None
