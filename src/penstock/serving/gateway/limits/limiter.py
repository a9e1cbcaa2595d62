"""Limits of keys and tenants as the routes see them: a ticket at admission, settled at the end.

    admit ─▶ known refusal? ─▶ store.admit ─▶ Ticket ─ … the answer … ─▶ Ticket.settle ─▶ queue ─▶ store.settle

docs/accounting.md says what is charged when. How it is counted is the stores' matter (local_store, redis_store), what happens without a
store is fallback's, and what the store is told behind the answers is settler's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from penstock.core.errors import InvalidRequestError, RateLimitError
from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import Prompt
from penstock.serving.gateway.identity import Identity
from penstock.serving.gateway.limits.estimate import estimate
from penstock.serving.gateway.limits.fallback import FailurePolicy, FallbackLimitStore
from penstock.serving.gateway.limits.headers import limit_headers
from penstock.serving.gateway.limits.interface import LEASE_S, LimitStore, Reservation, Subject, Verdict
from penstock.serving.gateway.limits.local_store import LocalLimitStore
from penstock.serving.gateway.limits.refusals import KnownRefusals
from penstock.serving.gateway.limits.settler import Settler
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from penstock.serving.gateway.stores.redis_link import RedisLink

# Nobody knows when a running request ends.
CONCURRENCY_RETRY_S = 1.0
_WORDS = {"requests": "requests per minute", "tokens": "tokens per minute", "concurrency": "concurrent requests"}


class Limiter:
    """Used from one event loop: `start` before the first request, `close` after the last. Owns the store. `clock`: monotonic seconds.

    An identity without its own limit for a key gets the defaults of the settings; without any limit the store is not asked.
    """

    def __init__(
        self,
        store: LimitStore,
        config: GatewayConfig,
        recorder: Recorder,
        clock: Callable[[], float] = time.monotonic,
        *,
        lease_s: float = LEASE_S,
    ) -> None:
        self._store = store
        self._config = config
        self._recorder = recorder
        self._clock = clock
        self._settler = Settler(store, recorder, lease_s=lease_s)
        self._refusals = KnownRefusals()

    async def start(self) -> None:
        """Begin to settle and to renew leases. Idempotent."""
        self._settler.start()

    async def close(self) -> None:
        """Settle what has ended and close the store. Idempotent."""
        await self._settler.close()
        await self._store.close()

    async def flush(self) -> None:
        """Return when everything that has ended by now was told to the store."""
        await self._settler.flush()

    def estimate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> tuple[int, int]:
        """Prompt tokens and output tokens to reserve for a request."""
        return estimate(prompts, sampling, self._config.reserve_output_tokens)

    def refusal_known(self, identity: Identity) -> RateLimitError | None:
        """The refusal that `admit` would give whatever the request is, without asking the store; None when that is not known."""
        if identity.over_budget:
            return self._over_budget()
        subjects = self._subjects(identity)
        verdict = self._refusals.find((identity.tenant, subjects), self._clock())
        return None if verdict is None else self._refused(verdict)

    async def admit(self, identity: Identity, request_id: str, prompt_tokens: int, output_tokens: int) -> Ticket:
        """Charge a request. `request_id` is ours: unique, and the same when a lost answer makes the admission be repeated.

        Raises RateLimitError, with code `insufficient_quota` when the budget is spent; InvalidRequestError with code
        `request_exceeds_limit` for one that can never pass; StoreUnavailableError by the policy for that.
        """
        if identity.over_budget:
            raise self._over_budget()
        subjects = self._subjects(identity)
        if not subjects:
            return Ticket(self, None, {})
        tokens = self.counted(prompt_tokens, output_tokens)
        _check_possible(subjects, tokens)
        who = (identity.tenant, subjects)
        asked_at = self._clock()
        verdict = self._refusals.find(who, asked_at)
        reservation = Reservation(request_id, identity.tenant, list(subjects), tokens)
        if verdict is None:
            verdict = await self._ask(reservation)
            self._refusals.note(who, verdict, asked_at)
        if not verdict.allowed:
            raise self._refused(verdict)
        ticket = Ticket(self, reservation, limit_headers(verdict.requests, verdict.tokens))
        if any(subject.concurrency is not None for subject in subjects):
            self._settler.hold(reservation)
        return ticket

    def counted(self, prompt_tokens: int, output_tokens: int) -> int:
        """The tokens that count against a minute's."""
        part = self._config.tokens_counted
        return (prompt_tokens if part != "output" else 0) + (output_tokens if part != "input" else 0)

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """A ticket's way to settle; use Ticket.settle."""
        has_slot = any(subject.concurrency is not None for subject in reservation.subjects)
        counts_tokens = any(subject.tokens_per_minute is not None for subject in reservation.subjects)
        if has_slot or (counts_tokens and tokens != reservation.tokens):
            self._settler.settle(reservation, tokens)

    async def _ask(self, reservation: Reservation) -> Verdict:
        returning = self._settler.returning(reservation)
        try:
            verdict = await self._store.admit(reservation)
            if verdict.refused_by == "concurrency" and returning:
                # The slot of a request that the client has seen the end of must not stand in its way.
                await self._settler.tell(returning)
                verdict = await self._store.admit(reservation)
        except asyncio.CancelledError:
            # The client left while the answer was on its way: it may have been admitted.
            self._settler.settle(reservation, 0)
            raise
        return verdict

    def _subjects(self, identity: Identity) -> tuple[Subject, ...]:
        """Those of key and tenant that have a limit."""
        config, key, tenant = self._config, identity.key_limits, identity.tenant_limits
        requests, tokens, concurrency = key.requests_per_minute, key.tokens_per_minute, key.concurrency
        if requests is None:
            requests = config.default_rpm or None
        if tokens is None:
            tokens = config.default_tpm or None
        if concurrency is None:
            concurrency = config.default_concurrency or None
        subjects: tuple[Subject, ...] = ()
        if not (requests is None and tokens is None and concurrency is None):
            subjects = (Subject(f"key:{identity.key_id}", requests, tokens, concurrency),)
        if not (tenant.requests_per_minute is None and tenant.tokens_per_minute is None and tenant.concurrency is None):
            name = f"tenant:{identity.tenant}"
            subjects += (Subject(name, tenant.requests_per_minute, tenant.tokens_per_minute, tenant.concurrency),)
        return subjects

    def _over_budget(self) -> RateLimitError:
        self._recorder.increment(metrics.LIMITED, "budget")
        return RateLimitError(
            "The budget of this API key is spent. Ask your administrator to raise it.",
            retry_after_s=None,
            code="insufficient_quota",
        )

    def _refused(self, verdict: Verdict) -> RateLimitError:
        kind = verdict.refused_by or "requests"
        self._recorder.increment(metrics.LIMITED, kind)
        retry_after_s = CONCURRENCY_RETRY_S if kind == "concurrency" else verdict.retry_after_s
        return RateLimitError(
            f"The limit of {_WORDS[kind]} of {_owner(verdict.subject)} is reached. Retry in {retry_after_s:.3f} s.",
            retry_after_s=retry_after_s,
            headers=limit_headers(verdict.requests, verdict.tokens),
        )


class Ticket:
    """An admitted request. `headers` show the state of its limits. To be settled once; a ticket that is lost is cancelled."""

    __slots__ = ("_limiter", "_reservation", "headers")

    def __init__(self, limiter: Limiter, reservation: Reservation | None, headers: dict[bytes, bytes]) -> None:
        self.headers = headers
        self._limiter = limiter
        self._reservation = reservation

    def settle(self, prompt_tokens: int, output_tokens: int) -> None:
        """Replace what was reserved by what was used and give the slot back, soon; further calls do nothing."""
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            self._limiter.settle(reservation, self._limiter.counted(prompt_tokens, output_tokens))

    def cancel(self) -> None:
        """The request came to nothing: it counts as a request without tokens."""
        self.settle(0, 0)

    def __del__(self) -> None:
        self.cancel()


def build_limiter(
    config: GatewayConfig, recorder: Recorder, *, redis: RedisLink | None, shared: LimitStore | None
) -> Limiter:
    """Limits in Redis, else in the coordinator's `shared` store, else in this process."""
    if redis is not None:
        from penstock.serving.gateway.limits.redis_store import RedisLimitStore

        shared = RedisLimitStore(redis)
    if shared is None:
        return Limiter(LocalLimitStore(), config, recorder)
    return Limiter(FallbackLimitStore(shared, cast(FailurePolicy, config.redis_limits_failure)), config, recorder)


def _check_possible(subjects: Sequence[Subject], tokens: int) -> None:
    """Raises InvalidRequestError when the request is above a limit even while nothing else runs."""
    for subject in subjects:
        for kind, amount, limit in (
            ("tokens", tokens, subject.tokens_per_minute),
            ("requests", 1, subject.requests_per_minute),
            ("concurrency", 1, subject.concurrency),
        ):
            if limit is not None and amount > limit:
                unit = "tokens, prompt and max_tokens together," if kind == "tokens" else "request"
                raise InvalidRequestError(
                    f"This request counts as {amount} {unit} and {_owner(subject.name)} may have {limit} {_WORDS[kind]}.",
                    code="request_exceeds_limit",
                )


def _owner(subject: str) -> str:
    return "this API key" if subject.startswith("key:") else "this tenant"
