"""Settles what one request owes, whatever its end: limits, admission and ledger. docs/accounting.md has the table."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from penstock.core.errors import AbortedError, DeadlineExceededError
from penstock.serving.gateway.accounts.interface import UsageOutcome, UsageRecord
from penstock.serving.gateway.cache.interface import CacheOutcome
from penstock.serving.gateway.generation.call import Call
from penstock.serving.gateway.results import Tally
from penstock.serving.gateway.state import Gateway


class Ticket(Protocol):
    """What limits gave out at admission."""

    def settle(self, prompt_tokens: int, output_tokens: int) -> None: ...


class Slot(Protocol):
    """A place in the engine."""

    def leave(self) -> None: ...


class Charge(AbstractContextManager["Charge"]):
    """Surrounds one generation; an exception that leaves the block decides the outcome.

    `source` says where the answer comes from, as far as that is known by now; whoever opens the stream sets it. `promoted` is called
    when the request takes over a generation that another one began: it then pays for what is made from there on.
    """

    def __init__(self, gateway: Gateway, call: Call, tally: Tally, ticket: Ticket) -> None:
        self.source: Callable[[], CacheOutcome] = lambda: "bypass"
        self.slot: Slot | None = None
        self._gateway = gateway
        self._call = call
        self._tally = tally
        self._ticket = ticket
        self._not_ours = 0
        self._took_over = False

    def promoted(self) -> None:
        """From here on this request pays."""
        self._not_ours = self._tally.usage().completion_tokens
        self._took_over = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.slot is not None:
            self.slot.leave()
        outcome = _outcome(error)
        usage = self._tally.usage()
        cache = self.source()
        pays = outcome != "failed" and cache in ("miss", "bypass")
        prompt_tokens = 0 if self._took_over else usage.prompt_tokens
        self._ticket.settle(prompt_tokens if pays else 0, usage.completion_tokens - self._not_ours if pays else 0)
        sink = self._gateway.services.usage
        if sink is None or outcome == "failed":
            return
        all_cached = cache in ("hit", "coalesced") or self._took_over
        sink.record(
            UsageRecord(
                request_id=self._call.id,
                at=time.time(),
                key_id=self._call.identity.key_id,
                tenant=self._call.identity.tenant,
                model=self._call.model,
                outcome=outcome,
                cache=cache,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.prompt_tokens if all_cached else usage.prompt_tokens_details.cached_tokens,
                output_tokens=usage.completion_tokens,
            )
        )


def _outcome(error: BaseException | None) -> UsageOutcome:
    if error is None:
        return "completed"
    if isinstance(error, AbortedError | DeadlineExceededError | asyncio.CancelledError):
        return "cancelled"
    return "failed"
