"""What happened to one request, read from the recorded events of its stream.

How many tokens an event carries is taken from, in this order: the running `usage.completion_tokens` (continuous usage statistics; vLLM
and Penstock send them when asked), the event's `token_ids`, else one per event with text. The first two count right when a server
merges tokens into one event or holds back text; with the third, arrivals are those of events, and the record says so.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    stream_error, bad_response), None for success; `detail` is the server's text.
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


def read_response(record: RequestRecord, response: Response) -> RequestRecord:
    """Complete `record` from a finished response."""
    if response.status != 200:
        return failed(record, f"http_{response.status}", response.body[:500].decode("utf-8", "replace"))
    try:
        events = [(at, _event_decoder.decode(data)) for at, data in response.events]
    except msgspec.DecodeError as error:
        return failed(record, "bad_response", str(error))
    seen, total = 0, None
    source: TokenSource = "events"
    arrivals: list[tuple[float, int]] = []
    changes: dict[str, Any] = {}
    for at, event in events:
        if event.error is not None:
            return failed(record, "stream_error", msgspec.json.encode(event.error)[:500].decode(), arrivals)
        usage = event.usage
        if usage is not None:
            total = usage.completion_tokens if usage.completion_tokens is not None else total
            changes["prompt_tokens"] = usage.prompt_tokens
            if usage.prompt_tokens_details is not None:
                changes["cached_tokens"] = usage.prompt_tokens_details.cached_tokens
        for choice in event.choices:
            count, event_source = _tokens_in(choice, usage, seen)
            if count:
                source = event_source
                seen += count
                arrivals.append((at, count))
            changes["finish_reason"] = choice.finish_reason or changes.get("finish_reason")
    if not arrivals or not response.done:
        kind = "disconnected" if arrivals else "bad_response"
        return failed(record, kind, "The stream ended without tokens or without [DONE].", arrivals)
    return replace(
        record,
        arrivals=tuple(arrivals),
        output_tokens=seen if total is None else total,
        counted_by=source,
        exact=seen == total,
        **changes,
    )


def failed(record: RequestRecord, error: str, detail: str, arrivals: Sequence[tuple[float, int]] = ()) -> RequestRecord:
    """`record` as a failure; tokens that had arrived stay in it but count in no latency."""
    return replace(
        record,
        error=error,
        detail=detail,
        arrivals=tuple(arrivals),
        output_tokens=sum(count for _, count in arrivals),
    )


def _tokens_in(choice: _Choice, usage: _Usage | None, seen: int) -> tuple[int, TokenSource]:
    """Tokens that a choice of an event brought, after `seen` earlier ones, and how that is known."""
    if usage is not None and usage.completion_tokens is not None:
        return max(usage.completion_tokens - seen, 0), "usage"
    if choice.token_ids is not None:
        return len(choice.token_ids), "token_ids"
    return int(choice.has_text), "events"
