"""What a response reads from: the news of one request, whoever makes them."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from penstock.serving.gateway.results import News


class NewsStream(Protocol):
    """An async context manager for one reader. Leaving it early ends the reader's part in the generation.

    The generations of the request (DeltaStream), a generation shared with others, or an answer from the cache.
    """

    async def __aenter__(self) -> NewsStream: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @property
    def ended(self) -> bool:
        """True when nothing more will come."""
        ...

    async def wait(self, timeout_s: float) -> bool:
        """Wait for news; False when `timeout_s` passed or all is done. Raises the request's error, or DeadlineExceededError."""
        ...

    async def gather(self, seconds: float) -> None:
        """Let news collect for `seconds`; returns early when the request ends."""
        ...

    def take(self) -> list[News]:
        """What has come since the last call, in order of arrival."""
        ...
