"""What limits count, on both stores: windows that slide, slots that are leased, all subjects or none."""

from __future__ import annotations

import itertools
import random

import pytest

from penstock.serving.gateway.limits.interface import LEASE_S, WINDOW_S, LimitStore, Reservation, Subject, Verdict
from penstock.serving.gateway.limits.local_store import SUB_BUCKETS, LocalLimitStore
from tests.serving.gateway.limits.conftest import MakeStore
from tests.serving.gateway.limits.limit_clock import Clock

_ids = itertools.count()
MILLISECOND = 0.001


def reservation(
    *subjects: Subject, tokens: int = 0, request_id: str | None = None, tenant: str = "acme"
) -> Reservation:
    return Reservation(request_id or f"r{next(_ids)}", tenant, list(subjects), tokens)


def key(name: str = "a", *, rpm: int | None = None, tpm: int | None = None, concurrency: int | None = None) -> Subject:
    return Subject(f"key:{name}", rpm, tpm, concurrency)


async def admit(store: LimitStore, *subjects: Subject, tokens: int = 0) -> Verdict:
    return await store.admit(reservation(*subjects, tokens=tokens))


async def test_a_window_slides(store: LimitStore, clock: Clock) -> None:
    limited = key(rpm=3)
    for _ in range(3):
        assert (await admit(store, limited)).allowed
        clock.advance(10)
    # 30 s after the first: a fixed window or a refilling bucket would let one in before the first has left.
    for _ in range(29):
        verdict = await admit(store, limited)
        assert (verdict.allowed, verdict.refused_by, verdict.subject) == (False, "requests", "key:a")
        clock.advance(1)
    assert not (await admit(store, limited)).allowed
    clock.advance(1)
    assert (await admit(store, limited)).allowed
    assert not (await admit(store, limited)).allowed


async def test_retry_after_is_exact(store: LimitStore, clock: Clock) -> None:
    limited = key(rpm=2)
    await admit(store, limited)
    clock.advance(7.25)
    await admit(store, limited)
    clock.advance(3)
    verdict = await admit(store, limited)
    assert verdict.retry_after_s == pytest.approx(WINDOW_S - 10.25, abs=1e-6)
    clock.advance(verdict.retry_after_s - MILLISECOND)
    assert (await admit(store, limited)).retry_after_s == pytest.approx(MILLISECOND, abs=1e-6)
    clock.advance(MILLISECOND)
    assert (await admit(store, limited)).allowed


async def test_retry_after_of_tokens_waits_for_as_many_as_are_needed(store: LimitStore, clock: Clock) -> None:
    limited = key(tpm=100)
    for tokens in (30, 40, 20):
        assert (await admit(store, limited, tokens=tokens)).allowed
        clock.advance(5)
    assert (await admit(store, limited, tokens=10)).allowed
    small, large = await admit(store, limited, tokens=30), await admit(store, limited, tokens=31)
    assert (small.refused_by, large.refused_by) == ("tokens", "tokens")
    assert small.retry_after_s == pytest.approx(45, abs=1e-6)
    assert large.retry_after_s == pytest.approx(50, abs=1e-6)
    clock.advance(small.retry_after_s - MILLISECOND)
    assert not (await admit(store, limited, tokens=30)).allowed
    clock.advance(MILLISECOND)
    assert (await admit(store, limited, tokens=30)).allowed
    clock.advance(large.retry_after_s - small.retry_after_s)
    assert (await admit(store, limited, tokens=31)).allowed


async def test_retry_after_of_a_request_that_needs_the_room_of_many(store: LimitStore, clock: Clock) -> None:
    limited = key(tpm=200)
    for _ in range(200):
        assert (await admit(store, limited, tokens=1)).allowed
        clock.advance(0.1)
    for needed in (1, 64, 65, 150, 200):
        verdict = await admit(store, limited, tokens=needed)
        assert verdict.retry_after_s == pytest.approx(WINDOW_S - 20 + 0.1 * (needed - 1), abs=1e-6)


async def test_what_leaves_now_has_left(store: LimitStore, clock: Clock) -> None:
    limited = key(rpm=5, tpm=100)
    await admit(store, limited, tokens=10)
    clock.advance(WINDOW_S)
    verdict = await admit(store, limited, tokens=10)
    assert verdict.requests is not None
    assert verdict.tokens is not None
    assert (verdict.requests.remaining, verdict.tokens.remaining) == (4, 90)


async def test_many_leave_at_once(store: LimitStore, clock: Clock) -> None:
    limited = key(rpm=500, tpm=1000)
    for _ in range(300):
        assert (await admit(store, limited, tokens=2)).allowed
        clock.advance(0.001)
    clock.advance(WINDOW_S - 0.1)
    verdict = await admit(store, limited, tokens=2)
    assert verdict.requests is not None
    assert verdict.tokens is not None
    # 0.1 s of them, and the one that came now.
    assert (verdict.requests.remaining, verdict.tokens.remaining) == (500 - 100, 1000 - 200)


async def test_retry_after_is_that_of_the_limit_in_the_way_longest(store: LimitStore, clock: Clock) -> None:
    limited, tenant = key(rpm=1), Subject("tenant:acme", None, 100, None)
    await admit(store, limited)
    clock.advance(20)
    await admit(store, tenant, tokens=100)
    verdict = await admit(store, limited, tenant, tokens=1)
    assert (verdict.refused_by, verdict.subject, verdict.retry_after_s) == ("tokens", "tenant:acme", 60)
    clock.advance(60)
    assert (await admit(store, limited, tenant, tokens=1)).allowed


async def test_a_refused_request_leaves_no_trace(store: LimitStore, clock: Clock) -> None:
    limited, tenant = key(rpm=5, tpm=50, concurrency=9), Subject("tenant:acme", 1, None, None)
    assert (await admit(store, limited, tenant, tokens=10)).allowed
    for _ in range(20):
        verdict = await admit(store, limited, tenant, tokens=10)
        assert (verdict.refused_by, verdict.subject) == ("requests", "tenant:acme")
    # The key alone still has what the first request left it.
    for _ in range(4):
        assert (await admit(store, limited, tokens=10)).allowed
    assert (await admit(store, limited, tokens=10)).refused_by == "requests"
    clock.advance(WINDOW_S)
    assert (await admit(store, limited, tenant, tokens=10)).allowed


async def test_subjects_of_two_tenants_with_one_name_are_two(store: LimitStore) -> None:
    limited = key("jwt:alice", rpm=1)
    assert (await store.admit(reservation(limited, tenant="a"))).allowed
    assert (await store.admit(reservation(limited, tenant="b"))).allowed
    assert not (await store.admit(reservation(limited, tenant="a"))).allowed


@pytest.mark.parametrize("name", ["", "}{", "{a}", "x" * 100_000, "ü \n\0\ud800", "key:*?[a-z]"])
async def test_any_name_of_a_tenant_and_a_key_counts(store: LimitStore, name: str) -> None:
    limited = [Subject(f"key:{name}", 1, 10, 1), Subject(f"tenant:{name}", 1, 10, 1)]
    first = Reservation("r-any-name", name, limited, 5)
    assert (await store.admit(first)).allowed
    await store.renew([first])
    await store.settle(first, 3)
    verdict = await store.admit(Reservation("r-any-name-2", name, limited, 5))
    assert (verdict.allowed, verdict.subject, verdict.tokens and verdict.tokens.remaining) == (
        False,
        limited[0].name,
        7,
    )


async def test_an_admission_that_is_repeated_is_charged_once(store: LimitStore) -> None:
    limited = key(rpm=2, tpm=100, concurrency=1)
    request = reservation(limited, tokens=40)
    first = await store.admit(request)
    second = await store.admit(request)
    assert first == second
    assert second.requests is not None
    assert second.requests.remaining == 1
    await store.settle(request, 10)
    verdict = await admit(store, limited, tokens=90)
    assert verdict.allowed


async def test_settlement_counts_at_the_time_of_admission(store: LimitStore, clock: Clock) -> None:
    limited = key(tpm=100)
    request = reservation(limited, tokens=80)
    await store.admit(request)
    clock.advance(30)
    assert not (await admit(store, limited, tokens=30)).allowed
    await store.settle(request, 20)
    assert (await admit(store, limited, tokens=80)).allowed
    clock.advance(30)
    # The 20 have left, the 80 have not.
    assert not (await admit(store, limited, tokens=21)).allowed
    assert (await admit(store, limited, tokens=20)).allowed


async def test_settlement_above_the_reservation_overdraws(store: LimitStore, clock: Clock) -> None:
    limited = key(tpm=100)
    request = reservation(limited, tokens=10)
    await store.admit(request)
    clock.advance(1)
    await store.settle(request, 250)
    verdict = await admit(store, limited, tokens=1)
    assert verdict.tokens is not None
    assert (verdict.refused_by, verdict.retry_after_s, verdict.tokens.remaining) == ("tokens", 59, 0)
    # What takes nothing from a window does not wait for it.
    assert (await admit(store, limited, tokens=0)).allowed
    clock.advance(59)
    assert (await admit(store, limited, tokens=100)).allowed


async def test_settlement_is_idempotent_and_harmless_when_late_or_unknown(store: LimitStore, clock: Clock) -> None:
    limited = key(tpm=100, concurrency=2)
    request = reservation(limited, tokens=60)
    await store.admit(request)
    await store.settle(reservation(limited, tokens=60), 0)
    for _ in range(3):
        await store.settle(request, 30)
    assert (await admit(store, limited, tokens=70)).allowed
    late = reservation(key("b", tpm=100, concurrency=1), tokens=100)
    await store.admit(late)
    clock.advance(2 * WINDOW_S)
    await store.settle(late, 500)
    assert (await admit(store, key("b", tpm=100, concurrency=1), tokens=100)).allowed


async def test_slots_are_given_back(store: LimitStore) -> None:
    limited, tenant = key(concurrency=2), Subject("tenant:acme", None, None, 2)
    first, second = reservation(limited, tenant), reservation(limited, tenant)
    assert (await store.admit(first)).allowed
    assert (await store.admit(second)).allowed
    verdict = await admit(store, limited, tenant)
    assert (verdict.refused_by, verdict.subject, verdict.retry_after_s) == ("concurrency", "key:a", 0)
    await store.settle(first, 0)
    assert (await admit(store, limited, tenant)).allowed
    assert not (await admit(store, tenant)).allowed


async def test_the_slot_of_a_killed_worker_is_free_after_its_lease(store: LimitStore, clock: Clock) -> None:
    limited = key(concurrency=1)
    await store.admit(reservation(limited))
    clock.advance(LEASE_S - MILLISECOND)
    assert not (await admit(store, limited)).allowed
    clock.advance(MILLISECOND)
    assert (await admit(store, limited)).allowed


async def test_a_slot_that_is_renewed_is_kept(store: LimitStore, clock: Clock) -> None:
    limited = key(tpm=1000, concurrency=1)
    running = reservation(limited, tokens=10)
    await store.admit(running)
    for _ in range(20):
        clock.advance(LEASE_S / 2)
        await store.renew([running])
        assert (await admit(store, limited)).refused_by == "concurrency"
    await store.settle(running, 20)
    assert (await admit(store, limited)).allowed


async def test_a_renewal_takes_a_slot_that_was_lost(store: LimitStore, clock: Clock) -> None:
    limited = key(concurrency=1)
    running = reservation(limited)
    await store.admit(running)
    clock.advance(LEASE_S * 2)
    await store.renew([running])
    assert not (await admit(store, limited)).allowed
    await store.settle(running, 0)
    assert (await admit(store, limited)).allowed


async def test_windows_show_the_tightest_limit_after_the_decision(store: LimitStore, clock: Clock) -> None:
    limited, tenant = key(rpm=10, tpm=1000), Subject("tenant:acme", 5, 2000, None)
    first = await admit(store, limited, tenant, tokens=100)
    assert first.requests is not None
    assert first.tokens is not None
    assert (first.requests.limit, first.requests.remaining, first.requests.reset_s) == (5, 4, 60)
    assert (first.tokens.limit, first.tokens.remaining, first.tokens.reset_s) == (1000, 900, 60)
    clock.advance(12.5)
    refused = await admit(store, key(tpm=1000), tokens=950)
    assert refused.requests is None
    assert refused.tokens is not None
    assert (refused.tokens.remaining, refused.tokens.reset_s) == (900, 47.5)


async def test_a_limit_that_changes_counts_what_there_was(store: LimitStore, clock: Clock) -> None:
    for _ in range(4):
        await admit(store, key(rpm=4))
    assert (await admit(store, key(rpm=5))).allowed
    assert not (await admit(store, key(rpm=3))).allowed
    clock.advance(WINDOW_S)
    assert (await admit(store, key(rpm=1))).allowed


@pytest.mark.parametrize("seed", range(4))
async def test_a_crowded_window_never_admits_more_and_frees_in_time(
    make_store: MakeStore, clock: Clock, seed: int
) -> None:
    """Beyond the exact entries requests share sub-buckets: for them the window may be up to a sub-bucket longer, never shorter."""
    rng, limit, bucket_s = random.Random(seed), 12, WINDOW_S / SUB_BUCKETS
    store = make_store(exact_entries=5)
    limited = key(rpm=limit)
    admitted: list[float] = []
    for _ in range(250):
        clock.advance(rng.choice((0, 0.01, 0.3, 1.7, 9)))
        now = clock()
        within = sum(now - time < WINDOW_S - 1e-7 for time in admitted)
        within_longer = sum(now - time <= WINDOW_S + bucket_s for time in admitted)
        verdict = await admit(store, limited)
        if verdict.allowed:
            assert within < limit
            admitted.append(now)
        else:
            assert within_longer >= limit
            if rng.random() < 0.5:
                clock.advance(verdict.retry_after_s)
                assert sum(clock() - time < WINDOW_S - 1e-7 for time in admitted) < limit
                assert (await admit(store, limited)).allowed
                admitted.append(clock())
    assert len(admitted) > 5 * limit


async def test_a_clock_that_steps_back_lets_nobody_in(store: LimitStore, clock: Clock) -> None:
    """Redis counts on its machine's clock, which an operator or NTP may set."""
    limited = key(rpm=4, tpm=100)
    first = reservation(limited, tokens=10)
    await store.admit(first)
    clock.advance(-30)
    for _ in range(3):
        assert (await admit(store, limited, tokens=10)).allowed
    verdict = await admit(store, limited, tokens=10)
    assert (verdict.refused_by, verdict.retry_after_s) == ("requests", 90)
    await store.settle(first, 0)
    clock.advance(WINDOW_S)
    assert not (await admit(store, limited, tokens=10)).allowed
    clock.advance(30)
    assert (await admit(store, limited, tokens=100)).allowed


async def test_memory_is_bounded_by_what_the_last_window_admitted(clock: Clock) -> None:
    store = LocalLimitStore(clock)
    active = reservation(key("active", concurrency=1))
    await store.admit(active)
    for number in range(12_000):
        limited = key(str(number), rpm=2, tpm=10, concurrency=1)
        assert (await admit(store, limited, tokens=1)).allowed
        clock.advance(0.1)
        if number % 100 == 0:
            await store.renew([active])
    # 600 a minute come; each leaves a subject and a record for a window.
    assert len(store) < 4 * 600
    assert not (await admit(store, key("active", concurrency=1))).allowed


async def test_a_busy_window_keeps_a_bounded_log(clock: Clock) -> None:
    store = LocalLimitStore(clock, exact_entries=10)
    for _ in range(5_000):
        clock.advance(0.01)
        assert (await admit(store, key(rpm=10_000))).allowed
    (state,) = store._states.values()
    assert len(state.requests.entries) <= 10 + SUB_BUCKETS + 1
    assert state.requests.total == 5_000


async def test_refused_requests_of_strangers_are_not_kept(clock: Clock) -> None:
    store = LocalLimitStore(clock)
    for number in range(1000):
        assert not (await admit(store, key(str(number), rpm=0))).allowed
    assert len(store) == 0
