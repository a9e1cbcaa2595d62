"""Reads the generations of one HTTP request side by side and hands over what has come, merged as the reader wishes.

    EngineClient.generate(prompt 0) ─▶ reader task ─┐
    EngineClient.generate(prompt 1) ─▶ reader task ─┼─▶ pending deltas ─▶ wait() / take()
    …                                               ┘

Leaving the block cancels the readers and closes the iterators, which aborts what still runs. A reader of this stream that is slower
than the engines lets at most MAX_PENDING deltas wait here; then the readers stop and the engine's client merges.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

from penstock.core.errors import AbortedError, DeadlineExceededError, EngineError, OverloadedError
from penstock.serving.frontend.client import Delta, EngineClient, GenerationRequest
from penstock.serving.gateway.results import News
from penstock.serving.gateway.streaming.news_waiter import NewsWaiter

MAX_PENDING = 256


class DeltaStream:
    """An async context manager; `wait` and `take` are called by one task.

    The first generation that fails ends them all: `wait` raises its error, once what came before has been taken.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[GenerationRequest],
        on_delta: Callable[[int, Delta], None],
        timeout_s: float,
    ) -> None:
        self._client = client
        self._requests = requests
        self._on_delta = on_delta
        self._timeout_s = timeout_s
        self._deadline = 0.0
        self._pending: list[News] = []
        self._open = len(requests)
        self._error: BaseException | None = None
        self._waiter = NewsWaiter()
        self._room = asyncio.Event()
        self._room.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> DeltaStream:
        self._deadline = asyncio.get_running_loop().time() + self._timeout_s
        self._tasks = [asyncio.create_task(self._read(i, request)) for i, request in enumerate(self._requests)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def ended(self) -> bool:
        """True when nothing more will come."""
        return self._open == 0 or self._error is not None

    async def wait(self, timeout_s: float) -> bool:
        """Wait for news; False when `timeout_s` passed or all is done. Raises the request's error, or DeadlineExceededError."""
        if not self._pending and not self.ended:
            await self._waiter.sleep(timeout_s, self._deadline, for_end=False)
        if self._pending:
            return True
        if self._error is not None:
            raise self._error
        if not self.ended and asyncio.get_running_loop().time() >= self._deadline:
            raise DeadlineExceededError(f"The request took longer than {self._timeout_s:g} s.")
        return False

    async def gather(self, seconds: float) -> None:
        """Let news collect for `seconds`; returns early when the request ends."""
        if seconds > 0 and not self.ended:
            await self._waiter.sleep(seconds, self._deadline, for_end=True)

    def take(self) -> list[News]:
        """What has come since the last call, in order of arrival."""
        news, self._pending = self._pending, []
        self._room.set()
        return news

    async def _read(self, prompt: int, request: GenerationRequest) -> None:
        iterator = self._client.generate(request)
        unfinished = set(range(request.sampling.n))
        try:
            async for delta in iterator:
                self._accept(prompt, delta)
                if delta.finish_reason is not None:
                    unfinished.discard(delta.index)
                if not self._room.is_set():
                    await self._room.wait()
            if unfinished:
                raise EngineError("The generation ended before it was complete.")
        except AbortedError:
            # Our own client is still there, so somebody else ended the request: a shutdown, mostly. Another try may succeed.
            self._error = self._error or OverloadedError("The server ended this request before it was complete.")
        except Exception as error:
            self._error = self._error or error
        finally:
            self._open -= 1
            if self.ended:
                self._waiter.end()
            close = getattr(iterator, "aclose", None)
            if close is not None:
                await close()

    def _accept(self, prompt: int, delta: Delta) -> None:
        if delta.finish_reason == "abort":
            raise AbortedError("The request was aborted by the server.")
        if delta.finish_reason == "error":
            raise EngineError("The generation failed.")
        self._on_delta(prompt, delta)
        self._pending.append((prompt, delta))
        if len(self._pending) >= MAX_PENDING:
            self._room.clear()
        self._waiter.news()
