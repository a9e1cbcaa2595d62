"""What happened to one request, read from the recorded events of its stream.

How many tokens an event carries is taken from, in this order: the running `usage.completion_tokens` (continuous usage statistics; vLLM
and Penstock send them when asked), the event's `token_ids`, else one per event with text. The first two count right when a server
merges tokens into one event or holds back text; with the third, arrivals are those of events, and the record says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from penstock.workbench.bench.http import Response

TokenSource = Literal["usage", "token_ids", "events"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What happened to one request. Times are of `time.perf_counter`.

    `due`: when it should have been sent; `sent`: when it was. `arrivals`: (time, tokens in that event), only events with tokens.
    `output_tokens` is the server's count where it gives one; `counted_by` says where the counts per event come from and
    `exact` whether they add up to `output_tokens`. `error`: kind of failure (connect, timeout, disconnected, http_<status>,
    stream_error, bad_response, no_tokens), None for success; `detail` is the server's text.
    """

    index: int
    due: float
    sent: float
    finished: float
    asked_tokens: int
    arrivals: tuple[tuple[float, int], ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: str | None = None
    counted_by: TokenSource = "events"
    exact: bool = False
    error: str | None = None
    detail: str = ""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Message | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None

    @property
    def has_text(self) -> bool:
        return bool(self.text or (self.delta and (self.delta.content or self.delta.reasoning_content)))


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_event_decoder = msgspec.json.Decoder(_Event)


@dataclass(frozen=True, slots=True)
class Stream:
    """What the events of a stream say. `total`: the server's count of output tokens; `error`: its error object, as JSON."""

    arrivals: tuple[tuple[float, int], ...]
    counted_by: TokenSource
    total: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    finish_reason: str | None
    error: str


def read_response(record: RequestRecord, response: Response, error: str = "", detail: str = "") -> RequestRecord:
    """Complete `record` from a response. `error` is the kind of failure that ended the exchange, "" for none; tokens that had
    arrived until then stay in the record but count in no latency."""
    if not error and response.status != 200:
        error, detail = f"http_{response.status}", response.body[:500].decode("utf-8", "replace")
    try:
        stream = read_events(response)
    except msgspec.DecodeError as broken:
        return replace(record, error=error or "bad_response", detail=detail or str(broken))
    if not error and stream.error:
        error, detail = "stream_error", stream.error
    elif not error and not response.done:
        error, detail = "disconnected", "The stream ended without [DONE]."
    elif not error and not stream.arrivals:
        error, detail = "no_tokens", "The stream had no tokens."
    seen = sum(count for _, count in stream.arrivals)
    return replace(
        record,
        arrivals=stream.arrivals,
        prompt_tokens=stream.prompt_tokens,
        output_tokens=seen if stream.total is None else stream.total,
        cached_tokens=stream.cached_tokens,
        finish_reason=stream.finish_reason,
        counted_by=stream.counted_by,
        exact=seen == stream.total,
        error=error or None,
        detail=detail,
    )


def read_events(response: Response) -> Stream:
    """The events that have arrived so far. Raises msgspec.DecodeError for what is not a completion event."""
    seen = 0
    arrivals: list[tuple[float, int]] = []
    source: TokenSource = "events"
    last = _Usage()
    finish_reason, error = None, ""
    for at, event in ((at, _event_decoder.decode(data)) for at, data in response.events):
        if event.error is not None:
            error = msgspec.json.encode(event.error)[:500].decode("utf-8", "replace")
        last = event.usage or last
        for choice in event.choices:
            count, event_source = _tokens_in(choice, event.usage, seen)
            if count:
                source = event_source
                seen += count
                arrivals.append((at, count))
            finish_reason = choice.finish_reason or finish_reason
    return Stream(
        arrivals=tuple(arrivals),
        counted_by=source,
        total=last.completion_tokens,
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.prompt_tokens_details.cached_tokens if last.prompt_tokens_details else None,
        finish_reason=finish_reason,
        error=error,
    )


def _tokens_in(choice: _Choice, usage: _Usage | None, seen: int) -> tuple[int, TokenSource]:
    """Tokens that a choice of an event brought, after `seen` earlier ones, and how that is known."""
    if usage is not None and usage.completion_tokens is not None:
        return max(usage.completion_tokens - seen, 0), "usage"
    if choice.token_ids is not None:
        return len(choice.token_ids), "token_ids"
    return int(choice.has_text), "events"
