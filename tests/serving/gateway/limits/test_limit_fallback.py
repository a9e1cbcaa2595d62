"""Limits while the shared store is away: each policy does what it says, and requests are settled where they were admitted."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest

from penstock.core.errors import RateLimitError, StoreUnavailableError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.identity import Identity, RateLimits
from penstock.serving.gateway.limits.fallback import FailurePolicy, FallbackLimitStore
from penstock.serving.gateway.limits.interface import Reservation, Subject, Verdict
from penstock.serving.gateway.limits.limiter import Limiter, build_limiter
from penstock.serving.gateway.limits.local_store import LocalLimitStore
from penstock.serving.gateway.stores.redis_link import RedisLink
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from tests.services import RedisServer
from tests.serving.gateway.limits.limit_clock import Clock, until

LIMITED = [Subject("key:a", 2, 100, 2)]


class SharedStore(LocalLimitStore):
    """Stands for Redis: it may be away."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.away = False

    async def admit(self, reservation: Reservation) -> Verdict:
        self._check()
        return await super().admit(reservation)

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        self._check()
        await super().settle(reservation, tokens)

    async def renew(self, reservations: list[Reservation]) -> None:
        self._check()
        await super().renew(reservations)

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailableError("away")


@pytest.fixture
def shared(clock: Clock) -> SharedStore:
    return SharedStore(clock)


def fallback(shared: SharedStore, policy: FailurePolicy, clock: Clock) -> FallbackLimitStore:
    return FallbackLimitStore(shared, policy, local=LocalLimitStore(clock))


def request(number: int, tokens: int = 10) -> Reservation:
    return Reservation(f"r{number}", "acme", LIMITED, tokens)


async def test_closed_refuses_with_503(shared: SharedStore, clock: Clock) -> None:
    store = fallback(shared, "closed", clock)
    shared.away = True
    with pytest.raises(StoreUnavailableError) as caught:
        await store.admit(request(1))
    assert (caught.value.status, caught.value.retry_after_s) == (503, 1.0)
    shared.away = False
    assert (await store.admit(request(1))).allowed


async def test_open_lets_all_pass_without_headers(shared: SharedStore, clock: Clock) -> None:
    limiter = Limiter(fallback(shared, "open", clock), GatewayConfig(), Recorder(), clock)
    who = Identity(tenant="acme", key_id="a", method="key", key_limits=RateLimits(2, 100, 2))
    shared.away = True
    tickets = [await limiter.admit(who, f"r{number}", 50, 50) for number in range(10)]
    assert [ticket.headers for ticket in tickets] == [{}] * 10
    shared.away = False
    for ticket in tickets:
        ticket.settle(1, 1)
    await limiter.flush()
    again = await limiter.admit(who, "again", 50, 50)
    assert again.headers[b"x-ratelimit-remaining-requests"] == b"1"
    await limiter.close()


async def test_local_counts_here_and_returns_to_the_shared_store_at_once(shared: SharedStore, clock: Clock) -> None:
    store = fallback(shared, "local", clock)
    assert (await store.admit(request(1))).allowed
    shared.away = True
    verdicts = [await store.admit(request(number)) for number in (2, 3, 4)]
    # Its own windows are empty at first: two more, not three.
    assert [verdict.allowed for verdict in verdicts] == [True, True, False]
    assert verdicts[2].refused_by == "requests"
    shared.away = False
    verdict = await store.admit(request(5))
    assert verdict.requests is not None
    assert (verdict.allowed, verdict.requests.remaining) == (True, 0)
    assert not (await store.admit(request(6))).allowed


async def test_requests_are_settled_and_renewed_where_they_were_admitted(shared: SharedStore, clock: Clock) -> None:
    store = fallback(shared, "local", clock)
    there, here = request(1, tokens=40), request(2, tokens=40)
    await store.admit(there)
    shared.away = True
    await store.admit(here)
    with pytest.raises(StoreUnavailableError):
        await store.settle(there, 5)
    clock.advance(10)
    with pytest.raises(StoreUnavailableError):
        await store.renew([there, here])
    clock.advance(10)
    # The renewal of the one here did not fail with the other's.
    await store.settle(here, 90)
    verdict = await store.admit(request(3, tokens=20))
    assert verdict.refused_by == "tokens"
    shared.away = False
    await store.settle(there, 5)
    verdict = await store.admit(request(4, tokens=95))
    assert verdict.allowed


class Recovering:
    """A limiter over a real Redis, as build_limiter makes it."""

    def __init__(self, server: RedisServer, policy: str) -> None:
        self.recorder = Recorder()
        self.server = server
        self.link = RedisLink(server.fresh(), self.recorder, timeout_s=10)
        config = GatewayConfig(redis_limits_failure=policy)
        self.limiter = build_limiter(config, self.recorder, redis=self.link, shared=None)
        self._numbers = itertools.count()

    async def admitted(self, who: Identity, count: int) -> int:
        """How many of `count` requests are admitted."""
        admitted = 0
        for _ in range(count):
            try:
                await self.limiter.admit(who, f"r{next(self._numbers)}", 1, 1)
            except RateLimitError:
                continue
            admitted += 1
        return admitted

    async def restart(self) -> None:
        """Start Redis, empty, and wait until it is used."""
        self.server.start()
        await until(lambda: self.link.available)


@pytest.fixture
async def recovering(redis_server: RedisServer, request: pytest.FixtureRequest) -> AsyncIterator[Recovering]:
    recovering = Recovering(redis_server, request.param)
    await recovering.limiter.start()
    yield recovering
    redis_server.start()
    await recovering.limiter.close()
    await recovering.link.close()


@pytest.mark.redis
@pytest.mark.parametrize("recovering", ["local"], indirect=True)
async def test_redis_restarted_twice_admits_at_most_twice_per_outage(recovering: Recovering) -> None:
    who = Identity(tenant="acme", key_id="a", method="key", key_limits=RateLimits(requests_per_minute=10))
    slots = Identity(tenant="acme", key_id="b", method="key", key_limits=RateLimits(concurrency=3))
    assert await recovering.admitted(who, 9) == 9
    held = await recovering.limiter.admit(slots, "held", 1, 1)
    recovering.server.stop()
    # Counted here, from the beginning; then Redis counts from the beginning.
    assert await recovering.admitted(who, 15) == 10
    assert recovering.recorder.value(metrics.LIMITED, "requests") == 5
    held.settle(1, 1)
    await recovering.restart()
    other = Identity(tenant="acme", key_id="c", method="key", key_limits=RateLimits(requests_per_minute=10))
    assert await recovering.admitted(other, 15) == 10
    recovering.server.stop()
    third = Identity(tenant="acme", key_id="d", method="key", key_limits=RateLimits(requests_per_minute=10))
    assert await recovering.admitted(third, 10) == 10
    await recovering.restart()
    assert await recovering.admitted(third, 15) == 10
    # The one who was refused before stays refused, whatever Redis forgot.
    assert await recovering.admitted(other, 15) == 0


@pytest.mark.redis
@pytest.mark.parametrize("recovering", ["closed"], indirect=True)
async def test_closed_with_a_real_redis(recovering: Recovering) -> None:
    limited = Identity(tenant="acme", key_id="a", method="key", key_limits=RateLimits(requests_per_minute=10))
    unlimited = Identity(tenant="acme", key_id="b", method="key")
    recovering.server.stop()
    with pytest.raises(StoreUnavailableError):
        await recovering.admitted(limited, 1)
    assert await recovering.admitted(unlimited, 3) == 3
    await recovering.restart()
    assert await recovering.admitted(limited, 11) == 10
