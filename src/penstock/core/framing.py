"""Messages on a byte stream between processes of one server: four bytes of length (big-endian), then the message.

The length is checked before anything is read into memory, so that a peer that is out of step cannot make this process allocate.
`read_frame` is for event loops, FrameSocket for threads that wait.
"""

from __future__ import annotations

import asyncio
import select
import socket

HEADER_BYTES = 4
_RECEIVED_AT_ONCE = 1 << 18


class FrameError(Exception):
    """A frame is larger than its bound, or the stream ended inside one. Nothing more can be read from this stream."""


def frame(message: bytes, max_bytes: int) -> bytes:
    """`message` with its length in front. Raises FrameError above `max_bytes`."""
    if len(message) > max_bytes:
        raise FrameError(f"a message of {len(message)} bytes is above the limit of {max_bytes}")
    return len(message).to_bytes(HEADER_BYTES, "big") + message


async def read_frame(reader: asyncio.StreamReader, max_bytes: int) -> bytes | None:
    """The next message; None when the stream ended after a whole one. Raises FrameError, or what the connection raises (OSError)."""
    try:
        head = await reader.readexactly(HEADER_BYTES)
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise FrameError("the stream ended inside a frame") from None
    size = int.from_bytes(head, "big")
    if size > max_bytes:
        raise FrameError(f"a frame of {size} bytes is above the limit of {max_bytes}")
    try:
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError:
        raise FrameError("the stream ended inside a frame") from None


class FrameSocket:
    """Frames on a connected stream socket, whose owner this becomes. Blocking, with the socket's own time-out.

    One thread may send while another receives. Everything raises OSError when the connection is broken (TimeoutError is one).
    """

    def __init__(self, sock: socket.socket, max_bytes: int) -> None:
        if sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        # Where the first frame that was not given out begins in the buffer.
        self._start = 0

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: bytes) -> None:
        """Raises FrameError when it is too large."""
        self.socket.sendall(frame(message, self._max_bytes))

    def receive(self) -> bytes | None:
        """Wait for the next message; None when the stream ended after a whole one. Raises FrameError."""
        while (message := self._whole_frame()) is None:
            if not self._fill():
                return None
        return message

    def arrived(self) -> list[bytes] | None:
        """All messages that are there after waiting for some bytes, perhaps none; None when the stream ended after a whole one. Raises
        FrameError."""
        if not self._fill():
            return None
        messages = []
        while (message := self._whole_frame()) is not None:
            messages.append(message)
        return messages

    def wait(self, timeout_s: float) -> bool:
        """Whether `receive` would find something within so many seconds: a message, a part of one, or the end."""
        return len(self._buffer) > self._start or bool(select.select([self.socket], [], [], timeout_s)[0])

    def close(self) -> None:
        """Idempotent."""
        self.socket.close()

    def _fill(self) -> bool:
        """Take what has arrived; False at the end."""
        received = self.socket.recv(_RECEIVED_AT_ONCE)
        if not received and len(self._buffer) > self._start:
            raise FrameError("the stream ended inside a frame")
        self._buffer += received
        return bool(received)

    def _whole_frame(self) -> bytes | None:
        head = self._start + HEADER_BYTES
        if len(self._buffer) < head:
            return None
        size = int.from_bytes(self._buffer[self._start : head], "big")
        if size > self._max_bytes:
            raise FrameError(f"a frame of {size} bytes is above the limit of {self._max_bytes}")
        if len(self._buffer) < head + size:
            return None
        message = bytes(memoryview(self._buffer)[head : head + size])
        self._start = head + size
        if self._start == len(self._buffer):
            self._buffer.clear()
            self._start = 0
        return message
