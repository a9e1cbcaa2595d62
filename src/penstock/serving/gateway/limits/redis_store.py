"""Limits counted in Redis: exact over any number of gateway processes, one script and one round trip per operation."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from penstock.serving.gateway.limits import scripts
from penstock.serving.gateway.limits.interface import (
    LEASE_S,
    WINDOW_S,
    Reservation,
    Subject,
    Verdict,
    Window,
)
from penstock.serving.gateway.limits.local_store import EXACT_ENTRIES, MICROSECONDS, REPEAT_S, SUB_BUCKETS
from penstock.serving.gateway.stores.redis_link import RedisLink

if TYPE_CHECKING:
    from redis.asyncio import Redis

_PURPOSE = "limits"
_DIGEST_BYTES = 16


class RedisLimitStore:
    """LimitStore in Redis. Does not own the link. Every method raises StoreUnavailableError while Redis is away.

    Time is Redis's own. `clock` (seconds) is for tests, which then decide what time it is.
    """

    def __init__(
        self,
        link: RedisLink,
        *,
        window_s: float = WINDOW_S,
        lease_s: float = LEASE_S,
        exact_entries: int = EXACT_ENTRIES,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._link = link
        self._clock = clock
        window = round(window_s * MICROSECONDS)
        self._rules = (
            window,
            max(1, window // SUB_BUCKETS),
            round(lease_s * MICROSECONDS),
            exact_entries,
            round(REPEAT_S * MICROSECONDS),
        )
        self._admit = _Script(scripts.ADMIT)
        self._settle = _Script(scripts.SETTLE)
        self._renew = _Script(scripts.RENEW)

    async def admit(self, reservation: Reservation) -> Verdict:
        limits = [
            -1 if limit is None else limit
            for subject in reservation.subjects
            for limit in (subject.requests_per_minute, subject.tokens_per_minute, subject.concurrency)
        ]
        answer = await self._run(self._admit, _keys(reservation), [reservation.request_id, reservation.tokens, *limits])
        allowed, kind, subject, wait, requests, tokens = answer
        return Verdict(
            allowed=allowed == 1,
            refused_by=kind.decode() or None,
            subject=reservation.subjects[subject - 1].name if subject else "",
            retry_after_s=wait / MICROSECONDS,
            requests=_window(requests),
            tokens=_window(tokens),
        )

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        await self._run(self._settle, _keys(reservation), [reservation.request_id, tokens])

    async def renew(self, reservations: list[Reservation]) -> None:
        by_tenant: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for reservation in reservations:
            keys, request_ids = by_tenant[reservation.tenant]
            for subject in reservation.subjects:
                if subject.concurrency is not None:
                    keys += (_subject_key(reservation.tenant, subject) + ":c", _request_key(reservation))
                    request_ids.append(reservation.request_id)
        # Keys of one script have one hash tag.
        for keys, request_ids in by_tenant.values():
            if keys:
                await self._run(self._renew, keys, request_ids)

    async def close(self) -> None:
        """Nothing to release."""

    async def _run(self, script: _Script, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        now = "" if self._clock is None else str(round(self._clock() * MICROSECONDS))
        return await self._link.call(lambda redis: script.run(redis, keys, (now, *self._rules, *arguments)), _PURPOSE)


class _Script:
    """A script that Redis knows by its digest, and is told again after it forgot it."""

    def __init__(self, source: str) -> None:
        self._source = source
        # Redis names scripts by SHA-1.
        self._digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    async def run(self, redis: Redis, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        from redis.exceptions import NoScriptError

        try:
            return await redis.evalsha(self._digest, len(keys), *keys, *arguments)
        except NoScriptError:
            return await redis.eval(self._source, len(keys), *keys, *arguments)


def _keys(reservation: Reservation) -> list[str]:
    keys = [_request_key(reservation)]
    for subject in reservation.subjects:
        base = _subject_key(reservation.tenant, subject)
        keys += [f"{base}:{part}" for part in scripts.SUBJECT_KEYS]
    return keys


def _request_key(reservation: Reservation) -> str:
    return f"penstock:limits:{{{_digest(reservation.tenant)}}}:request:{reservation.request_id}"


def _subject_key(tenant: str, subject: Subject) -> str:
    return f"penstock:limits:{{{_digest(tenant)}}}:{_digest(subject.name)}"


def _digest(name: str) -> str:
    """Names come from operators and tokens: their length and their braces must not decide where a counter lies."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()


def _window(answer: list[int]) -> Window | None:
    return Window(answer[0], answer[1], answer[2] / MICROSECONDS) if answer else None
