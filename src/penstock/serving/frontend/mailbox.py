"""Where one request's deltas wait for their reader. Putting never waits, and a slow reader finds merged deltas."""

from __future__ import annotations

import asyncio

from penstock.core.errors import RequestError
from penstock.core.types import FinishReason
from penstock.serving.frontend.client import Delta, TokenLogprob


class Mailbox:
    """At most one pending delta per sample, and after the last one the request's single outcome: done, or a RequestError.

    One reader. What was put before an error is still delivered before the error is raised. Nothing can be added after an outcome.
    """

    def __init__(self) -> None:
        self._pending: dict[int, Delta | _MergedDelta] = {}
        self._wake = asyncio.Event()
        self._done = False
        self._error: RequestError | None = None

    @property
    def closed(self) -> bool:
        """True when the outcome is known."""
        return self._done

    def put(self, delta: Delta) -> None:
        """Add news of one sample; ignored after the outcome."""
        if self._done:
            return
        pending = self._pending.get(delta.index)
        if pending is None:
            self._pending[delta.index] = delta
        else:
            if isinstance(pending, Delta):
                pending = self._pending[delta.index] = _MergedDelta(pending)
            pending.merge(delta)
        self._wake.set()

    def close(self, error: RequestError | None = None) -> None:
        """Set the outcome; only the first one counts."""
        if not self._done:
            self._done = True
            self._error = error
            self._wake.set()

    async def get(self) -> Delta | None:
        """The next delta, None at the end. Raises the request's error."""
        while True:
            if self._pending:
                pending = self._pending.pop(next(iter(self._pending)))
                return pending if isinstance(pending, Delta) else pending.freeze()
            if self._error is not None:
                raise self._error
            if self._done:
                return None
            self._wake.clear()
            await self._wake.wait()


class _MergedDelta:
    """The first delta and what was added to it since; joined once, when it is read."""

    __slots__ = ("_finish_reason", "_first", "_logprobs", "_stop_reason", "_texts", "_token_ids")

    def __init__(self, first: Delta) -> None:
        self._first = first
        self._texts: list[str] = [first.text]
        self._token_ids: list[int] = list(first.token_ids)
        self._logprobs: list[TokenLogprob] | None = None if first.logprobs is None else list(first.logprobs)
        self._finish_reason: FinishReason | None = first.finish_reason
        self._stop_reason = first.stop_reason

    def merge(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._token_ids += delta.token_ids
        if delta.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = []
            self._logprobs += delta.logprobs
        self._finish_reason = delta.finish_reason
        self._stop_reason = delta.stop_reason

    def freeze(self) -> Delta:
        first = self._first
        return Delta(
            index=first.index,
            text="".join(self._texts),
            token_ids=self._token_ids,
            offset=first.offset,
            num_output_tokens=first.offset + len(self._token_ids),
            num_prompt_tokens=first.num_prompt_tokens,
            num_cached_tokens=first.num_cached_tokens,
            logprobs=self._logprobs,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=first.prompt_logprobs,
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
            queue_time_s=first.queue_time_s,
        )
