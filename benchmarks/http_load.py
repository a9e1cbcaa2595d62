"""A load generator that costs little: prepared bytes over kept-alive connections, answers told apart by their Content-Length."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import cast

_SEPARATOR = b"\r\n\r\n"


@dataclass(slots=True)
class Load:
    """What one run saw. `seconds`: its length; `latencies`: seconds per answer; `statuses`: answers by HTTP status."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class _Connection(asyncio.Protocol):
    """Sends the request again as soon as its answer is whole, until told to stop."""

    def __init__(self, request: bytes, load: Load) -> None:
        self._request = request
        self._load = load
        self._transport = asyncio.Transport()
        self._buffer = b""
        self._sent = 0.0
        self._stopping = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(_SEPARATOR)
        if head_end < 0:
            return
        head = self._buffer[:head_end].lower()
        start = head.find(b"content-length:")
        end = head.find(b"\r\n", start)
        length = int(head[start + 15 : end if end > 0 else len(head)])
        if len(self._buffer) < head_end + len(_SEPARATOR) + length:
            return
        self._load.latencies.append(time.perf_counter() - self._sent)
        status = int(head[9:12])
        self._load.statuses[status] = self._load.statuses.get(status, 0) + 1
        self._buffer = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def stop(self) -> None:
        """Send nothing more."""
        self._stopping = True

    def _send(self) -> None:
        if self._stopping:
            self._transport.close()
            return
        self._sent = time.perf_counter()
        self._transport.write(self._request)


async def closed_loop(port: int, request: bytes, connections: int, seconds: float) -> Load:
    """`connections` clients that each wait for their answer before they ask again."""
    load, loop = Load(), asyncio.get_running_loop()
    started = time.perf_counter()
    clients = [
        (await loop.create_connection(lambda: _Connection(request, load), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    load.seconds = time.perf_counter() - started
    for client in clients:
        client.stop()
    await asyncio.wait_for(asyncio.gather(*(client.closed for client in clients)), 30)
    return load


def http_request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of a request; `_` in a header's name stands for `-`."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
