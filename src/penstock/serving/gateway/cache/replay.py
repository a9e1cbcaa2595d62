"""Between a generation and a cached answer: the news of a whole generation as one entry, and an entry as a stream of news."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import TracebackType

from penstock.serving.frontend.client import Delta, TokenLogprob
from penstock.serving.gateway.cache.interface import Entry
from penstock.serving.gateway.results import News

OnDelta = Callable[[int, Delta], None]


def as_shared(delta: Delta) -> Delta:
    """The delta as those see it for whom nothing was computed: all prompt tokens cached, no time in a queue."""
    return replace(delta, num_cached_tokens=delta.num_prompt_tokens, queue_time_s=None)


def join(news: Iterable[News]) -> list[News]:
    """One delta per choice that says all that its deltas say; in the order of prompts and samples."""
    parts: dict[tuple[int, int], list[Delta]] = {}
    for prompt, delta in news:
        parts.setdefault((prompt, delta.index), []).append(delta)
    return [(prompt, _join(parts[prompt, index])) for prompt, index in sorted(parts)]


def _join(deltas: list[Delta]) -> Delta:
    first, last = deltas[0], deltas[-1]
    if len(deltas) == 1:
        return first
    logprobs: list[TokenLogprob] | None = None
    if any(delta.logprobs is not None for delta in deltas):
        logprobs = [logprob for delta in deltas for logprob in delta.logprobs or ()]
    return Delta(
        index=first.index,
        text="".join([delta.text for delta in deltas]),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        offset=first.offset,
        num_output_tokens=last.num_output_tokens,
        num_prompt_tokens=last.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens,
        logprobs=logprobs,
        prompt_token_ids=first.prompt_token_ids,
        prompt_logprobs=first.prompt_logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        queue_time_s=first.queue_time_s,
    )


def make_entry(news: Iterable[News], created_at: float) -> Entry | None:
    """The entry of a whole generation; None unless every choice ended by itself."""
    joined = join(news)
    whole = joined and all(delta.finish_reason in ("stop", "length") for _, delta in joined)
    return Entry(created_at, [(prompt, as_shared(delta)) for prompt, delta in joined]) if whole else None


class ReplayStream:
    """A NewsStream of a cached answer: everything is there at once."""

    def __init__(self, entry: Entry, on_delta: OnDelta) -> None:
        self._news = entry.news
        self._on_delta = on_delta

    async def __aenter__(self) -> ReplayStream:
        for prompt, delta in self._news:
            self._on_delta(prompt, delta)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @property
    def ended(self) -> bool:
        return True

    async def wait(self, timeout_s: float) -> bool:
        return bool(self._news)

    async def gather(self, seconds: float) -> None: ...

    def take(self) -> list[News]:
        news, self._news = self._news, []
        return list(news)
