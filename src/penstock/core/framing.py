"""Messages on a byte stream between processes of one server: four bytes of length (big-endian), then the message.

The length is checked before anything is read into memory, so that a peer that is out of step cannot make this process allocate.
"""

from __future__ import annotations

import asyncio

HEADER_BYTES = 4


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
