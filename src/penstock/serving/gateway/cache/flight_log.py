"""The log of a shared generation as one process writes it and others read it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import TracebackType
from typing import Literal

import msgspec

from penstock.core.errors import ErrorInfo, StoreUnavailableError
from penstock.serving.frontend.client import Delta
from penstock.serving.gateway.cache.interface import CLAIM_S, FlightStore
from penstock.serving.gateway.results import News

logger = logging.getLogger(__name__)

PUBLISH_INTERVAL_S = 0.025
# A log that is whole stays for readers that are behind.
KEEP_S = 5.0
READ_WAIT_S = 1.0
MAX_LOG_BYTES = 16 * 1024 * 1024


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A piece of the log. `owner` tells the logs of two leaders apart. `done`: the answer is whole; `error`: it never will be."""

    owner: str
    news: list[News]
    done: bool = False
    error: ErrorInfo | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Chunk).decode


async def claim(store: FlightStore, key: str, owner: str) -> bool | None:
    """Whether `owner` leads now; None: there is no store to ask."""
    try:
        return await store.claim(key, owner, CLAIM_S)
    except StoreUnavailableError:
        return None


class LogReader:
    """Reads a key's log from its beginning, and from the beginning again when another leader's is in its place."""

    def __init__(self, store: FlightStore, key: str) -> None:
        self._store = store
        self._key = key
        self._position = 0
        self._leader = ""

    async def read(self) -> tuple[list[Chunk], Literal["running", "finished", "gone", "restarted"]]:
        """The next chunks. Raises StoreUnavailableError, and DecodeError for what nobody of ours wrote."""
        log = await self._store.read(self._key, self._position, READ_WAIT_S)
        chunks = [_decode(chunk) for chunk in log.chunks]
        if self._position == 0 and chunks:
            self._leader = chunks[0].owner
        replaced = any(chunk.owner != self._leader for chunk in chunks)
        if self._position > 0 and not chunks and log.state != "gone":
            # Silence: the log may be another one by now, and still shorter.
            replaced = await self._first_owner() != self._leader
        if replaced:
            self._position = 0
            return [], "restarted"
        self._position += len(chunks)
        return chunks, log.state

    async def _first_owner(self) -> str:
        head = await self._store.read(self._key, 0, 0.0)
        return _decode(head.chunks[0]).owner if head.chunks else ""


class Publisher:
    """Appends the news of the leader to its log. Inside the block a task does it; what is left goes with `end`.

    When the claim is lost or the store is away it stops: the leader's own readers go on, others find another leader.
    """

    def __init__(self, store: FlightStore, key: str, owner: str) -> None:
        self._store = store
        self._key = key
        self._owner = owner
        self._waiting: list[News] = []
        self._bytes = 0
        self._lost = False
        self._news = asyncio.Event()
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Publisher:
        self._tasks = [asyncio.create_task(self._run())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._news.set()
        for task in self._tasks:
            if kind is not None and issubclass(kind, asyncio.CancelledError):
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and (failure := task.exception()) is not None:
                # This process's readers have their answer; those of others find another leader.
                logger.error("the log of a shared generation could not be written", exc_info=failure)
                self._lost = True

    def add(self, prompt: int, delta: Delta) -> None:
        """The next news."""
        if not self._lost:
            self._waiting.append((prompt, delta))
            self._news.set()

    async def end(self, error: ErrorInfo | None) -> None:
        """Nothing follows: the answer is whole, or there will be none."""
        await self._append(_encode(Chunk(self._owner, self._take(), error is None, error)))

    async def finish(self) -> None:
        """Let go of the key. The log stays for those who are behind."""
        if not self._lost:
            # A store that is away forgets the claim by itself.
            with contextlib.suppress(StoreUnavailableError):
                await self._store.finish(self._key, self._owner, _encode(Chunk(self._owner, [], True)), KEEP_S)

    async def _run(self) -> None:
        while not self._lost and not self._stop.is_set():
            await _wait(self._news, CLAIM_S / 3)
            self._news.clear()
            news = self._take()
            await self._append(_encode(Chunk(self._owner, news)) if news else b"")
            await _wait(self._stop, PUBLISH_INTERVAL_S)

    async def _append(self, chunk: bytes) -> None:
        self._bytes += len(chunk)
        if self._lost:
            return
        try:
            if self._bytes > MAX_LOG_BYTES:
                self._lost = True
                await self._store.abandon(self._key, self._owner)
            elif not await self._store.append(self._key, self._owner, chunk, CLAIM_S):
                self._lost = True
        except StoreUnavailableError:
            self._lost = True
        if self._lost:
            self._waiting.clear()

    def _take(self) -> list[News]:
        news, self._waiting = self._waiting, []
        return news


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
