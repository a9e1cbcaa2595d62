"""The measurements of one generation: time to first token, time between tokens, tokens, outcome."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager
from types import TracebackType

from penstock.core.errors import (
    AbortedError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
)
from penstock.serving.frontend.client import Delta
from penstock.serving.gateway.cache.interface import CacheOutcome
from penstock.serving.gateway.results import Tally
from penstock.serving.gateway.state import Gateway
from penstock.telemetry import metrics
from penstock.telemetry.metrics import Outcome

_OUTCOMES: tuple[tuple[type[BaseException], Outcome], ...] = (
    (InvalidRequestError, "invalid"),
    (AbortedError, "aborted"),
    (OverloadedError, "overloaded"),
    (DeadlineExceededError, "deadline"),
    (EngineDeadError, "engine_dead"),
)


class Measurement(AbstractContextManager["Measurement"]):
    """Surrounds one generation; an exception that leaves the block decides the outcome. Time starts at construction.

    An answer `from_cache` has a histogram of its own: its times say nothing about an engine.
    """

    def __init__(self, gateway: Gateway, model: str, tally: Tally, *, from_cache: bool) -> None:
        self._gateway = gateway
        self._from_cache = from_cache
        self._recorder = gateway.recorder
        self._model = model
        self._tally = tally
        self._started = time.perf_counter()
        self._last: dict[tuple[int, int], float] = {}
        self._has_token = False

    def __enter__(self) -> Measurement:
        self._gateway.in_flight += 1
        self._recorder.increment(metrics.REQUESTS_IN_FLIGHT, self._model)
        return self

    def cache_outcome(self, outcome: CacheOutcome) -> None:
        """Count what the response cache did for this request."""
        self._recorder.increment(metrics.CACHE_LOOKUPS, self._model, outcome)

    def on_delta(self, prompt: int, delta: Delta) -> None:
        """Note a delta at the moment of its arrival."""
        if self._from_cache:
            return
        if delta.queue_time_s is not None:
            self._recorder.observe(metrics.QUEUE_SECONDS, delta.queue_time_s, self._model)
        count = len(delta.token_ids)
        if not count:
            return
        now = time.perf_counter()
        if not self._has_token:
            self._has_token = True
            self._recorder.observe(metrics.TIME_TO_FIRST_TOKEN, now - self._started, self._model)
        key = (prompt, delta.index)
        last = self._last.get(key)
        if last is not None:
            self._recorder.observe(metrics.INTER_TOKEN, (now - last) / count, self._model, count=count)
        self._last[key] = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._gateway.in_flight -= 1
        recorder, model, usage = self._recorder, self._model, self._tally.usage()
        recorder.increment(metrics.REQUESTS_IN_FLIGHT, model, by=-1)
        recorder.increment(metrics.REQUESTS, model, _outcome(error))
        recorder.increment(metrics.PROMPT_TOKENS, model, by=usage.prompt_tokens)
        recorder.increment(metrics.CACHED_PROMPT_TOKENS, model, by=usage.prompt_tokens_details.cached_tokens)
        recorder.increment(metrics.GENERATION_TOKENS, model, by=usage.completion_tokens)
        if error is None:
            seconds = metrics.CACHE_HIT_SECONDS if self._from_cache else metrics.REQUEST_SECONDS
            recorder.observe(seconds, time.perf_counter() - self._started, model)
            recorder.observe(metrics.REQUEST_PROMPT_TOKENS, usage.prompt_tokens, model)
            recorder.observe(metrics.REQUEST_GENERATION_TOKENS, usage.completion_tokens, model)


def _outcome(error: BaseException | None) -> Outcome:
    if error is None:
        return "completed"
    if isinstance(error, asyncio.CancelledError):
        return "aborted"
    return next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), "error")
