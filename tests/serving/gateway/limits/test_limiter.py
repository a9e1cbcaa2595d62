"""The limiter: who is limited by what, what a client is told, and that tickets give back what they hold."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from penstock.core.errors import InvalidRequestError, RateLimitError, StoreUnavailableError
from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import ChatPrompt, TextPrompt, TokensPrompt
from penstock.serving.gateway.identity import ANONYMOUS, NO_LIMITS, Identity, RateLimits
from penstock.serving.gateway.limits import refusals
from penstock.serving.gateway.limits.headers import format_duration
from penstock.serving.gateway.limits.interface import Reservation, Verdict
from penstock.serving.gateway.limits.limiter import Limiter, build_limiter
from penstock.serving.gateway.limits.local_store import LocalLimitStore
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.limits.limit_clock import Clock, until


class CountingStore(LocalLimitStore):
    """A LocalLimitStore that notes what it is asked, and may be slow or away."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.asked: list[str] = []
        self.away = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.admitting = asyncio.Event()

    async def admit(self, reservation: Reservation) -> Verdict:
        self.asked.append("admit")
        self.admitting.set()
        verdict = await super().admit(reservation)
        await self.gate.wait()
        return verdict

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        self.asked.append("settle")
        if self.away:
            raise StoreUnavailableError("away")
        await super().settle(reservation, tokens)

    async def renew(self, reservations: list[Reservation]) -> None:
        self.asked.append(f"renew {len(reservations)}")
        await super().renew(reservations)


@pytest.fixture
def store(clock: Clock) -> CountingStore:
    return CountingStore(clock)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def limiter(store: CountingStore, recorder: Recorder, clock: Clock) -> AsyncIterator[Limiter]:
    limiter = Limiter(store, GatewayConfig(), recorder, clock)
    await limiter.start()
    yield limiter
    await limiter.close()


def identity(key: RateLimits = NO_LIMITS, tenant: RateLimits = NO_LIMITS, **other: bool) -> Identity:
    return Identity(
        tenant="acme",
        key_id="k1",
        method="key",
        key_limits=key,
        tenant_limits=tenant,
        over_budget=other.get("broke", False),
    )


async def refusal(limiter: Limiter, who: Identity, prompt: int = 1, output: int = 1) -> RateLimitError:
    with pytest.raises(RateLimitError) as caught:
        await limiter.admit(who, "refused", prompt, output)
    return caught.value


async def test_without_limits_nobody_asks_the_store(limiter: Limiter, store: CountingStore) -> None:
    ticket = await limiter.admit(identity(), "r1", 10, 10)
    assert ticket.headers == {}
    assert limiter.refusal_known(identity()) is None
    ticket.settle(1, 1)
    ticket.cancel()
    await limiter.flush()
    assert store.asked == []


async def test_requests_per_minute(limiter: Limiter, recorder: Recorder, clock: Clock) -> None:
    who = identity(RateLimits(requests_per_minute=2))
    first = await limiter.admit(who, "r1", 1, 1)
    assert first.headers == {
        b"x-ratelimit-limit-requests": b"2",
        b"x-ratelimit-remaining-requests": b"1",
        b"x-ratelimit-reset-requests": b"1m0s",
    }
    clock.advance(20)
    await limiter.admit(who, "r2", 1, 1)
    error = await refusal(limiter, who)
    assert (error.status, error.code, error.retry_after_s) == (429, "rate_limit_exceeded", 40)
    assert error.message == "The limit of requests per minute of this API key is reached. Retry in 40.000 s."
    assert error.headers[b"x-ratelimit-remaining-requests"] == b"0"
    assert recorder.value(metrics.LIMITED, "requests") == 1
    clock.advance(40)
    await limiter.admit(who, "r3", 1, 1)


async def test_tokens_per_minute_are_reserved_and_settled(limiter: Limiter) -> None:
    who = identity(tenant=RateLimits(tokens_per_minute=100))
    ticket = await limiter.admit(who, "r1", 20, 60)
    assert ticket.headers == {
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"20",
        b"x-ratelimit-reset-tokens": b"1m0s",
    }
    error = await refusal(limiter, who, 10, 20)
    assert error.message.startswith("The limit of tokens per minute of this tenant is reached.")
    ticket.settle(25, 15)
    ticket.settle(90, 90)
    await limiter.flush()
    again = await limiter.admit(who, "r2", 10, 20)
    assert again.headers[b"x-ratelimit-remaining-tokens"] == b"30"


@pytest.mark.parametrize(("counted", "left"), [("both", b"70"), ("input", b"80"), ("output", b"90")])
async def test_tokens_counted(store: CountingStore, clock: Clock, counted: str, left: bytes) -> None:
    limiter = Limiter(store, GatewayConfig(tokens_counted=counted), Recorder(), clock)
    who = identity(RateLimits(tokens_per_minute=100))
    ticket = await limiter.admit(who, "r1", 20, 10)
    assert ticket.headers[b"x-ratelimit-remaining-tokens"] == left
    ticket.settle(20, 10)
    await limiter.close()
    assert (await limiter.admit(who, "r2", 0, 0)).headers[b"x-ratelimit-remaining-tokens"] == left


async def test_what_can_never_pass_is_refused_for_good(limiter: Limiter, store: CountingStore) -> None:
    for limits in (RateLimits(tokens_per_minute=100), RateLimits(requests_per_minute=0), RateLimits(concurrency=0)):
        with pytest.raises(InvalidRequestError) as caught:
            await limiter.admit(identity(tenant=limits), "r1", 50, 51)
        assert (caught.value.status, caught.value.code) == (400, "request_exceeds_limit")
    assert store.asked == []
    await limiter.admit(identity(RateLimits(tokens_per_minute=100)), "r1", 50, 50)


async def test_concurrency_is_given_back(limiter: Limiter, recorder: Recorder) -> None:
    who = identity(RateLimits(concurrency=2))
    first = await limiter.admit(who, "r1", 1, 1)
    second = await limiter.admit(who, "r2", 1, 1)
    error = await refusal(limiter, who)
    assert error.retry_after_s == 1
    assert recorder.value(metrics.LIMITED, "concurrency") == 1
    first.settle(1, 1)
    # No wait in between: a client that has its answer may ask again at once.
    third = await limiter.admit(who, "r3", 1, 1)
    second.cancel()
    third.cancel()


async def test_a_slot_that_comes_back_while_the_store_refuses(store: CountingStore, clock: Clock) -> None:
    """The store refused before it heard of the end that the client had seen, and its answer came after."""
    limiter = Limiter(store, GatewayConfig(), Recorder(), clock)
    who = identity(RateLimits(concurrency=1))
    first = await limiter.admit(who, "r1", 1, 1)
    first.settle(1, 1)
    store.gate.clear()
    store.admitting.clear()
    second = asyncio.create_task(limiter.admit(who, "r2", 1, 1))
    await store.admitting.wait()
    await limiter.flush()
    store.gate.set()
    (await second).cancel()
    await limiter.close()


async def test_a_ticket_that_is_lost_gives_back(limiter: Limiter) -> None:
    who = identity(RateLimits(concurrency=1, tokens_per_minute=100))
    ticket = await limiter.admit(who, "r1", 50, 50)
    assert ticket.headers
    del ticket
    gc.collect()
    await limiter.flush()
    await limiter.admit(who, "r2", 50, 50)


async def test_an_admission_that_is_cancelled_gives_back(limiter: Limiter, store: CountingStore) -> None:
    who = identity(RateLimits(concurrency=1, tokens_per_minute=100))
    store.gate.clear()
    task = asyncio.create_task(limiter.admit(who, "r1", 50, 50))
    await store.admitting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    store.gate.set()
    await limiter.flush()
    await limiter.admit(who, "r2", 50, 50)


async def test_limits_of_key_and_tenant_both_hold(limiter: Limiter) -> None:
    tenant = RateLimits(requests_per_minute=3)
    one = Identity(tenant="acme", key_id="k1", method="key", key_limits=RateLimits(2), tenant_limits=tenant)
    other = Identity(tenant="acme", key_id="k2", method="key", key_limits=RateLimits(2), tenant_limits=tenant)
    for number in range(2):
        await limiter.admit(one, f"a{number}", 1, 1)
    assert "of this API key" in (await refusal(limiter, one)).message
    await limiter.admit(other, "b1", 1, 1)
    assert "of this tenant" in (await refusal(limiter, other)).message


async def test_defaults_are_for_keys_without_limits_of_their_own(store: CountingStore, clock: Clock) -> None:
    config = GatewayConfig(default_rpm=1, default_tpm=50, default_concurrency=3)
    limiter = Limiter(store, config, Recorder(), clock)
    await limiter.admit(identity(), "r1", 1, 1)
    await refusal(limiter, identity())
    await limiter.admit(ANONYMOUS, "r2", 1, 1)
    await refusal(limiter, ANONYMOUS)
    own = Identity(tenant="acme", key_id="k2", method="key", key_limits=RateLimits(requests_per_minute=2))
    assert (await limiter.admit(own, "r3", 1, 1)).headers[b"x-ratelimit-limit-requests"] == b"2"
    with pytest.raises(InvalidRequestError):
        await limiter.admit(own, "r4", 25, 26)


async def test_over_budget_needs_no_store(limiter: Limiter, store: CountingStore, recorder: Recorder) -> None:
    who = identity(RateLimits(requests_per_minute=5), broke=True)
    error = await refusal(limiter, who)
    assert (error.status, error.code, error.retry_after_s) == (429, "insufficient_quota", None)
    known = limiter.refusal_known(who)
    assert known is not None
    assert known.code == "insufficient_quota"
    assert store.asked == []
    assert recorder.value(metrics.LIMITED, "budget") == 2


async def test_a_refusal_is_known_until_the_window_frees(limiter: Limiter, store: CountingStore, clock: Clock) -> None:
    who = identity(RateLimits(requests_per_minute=1), RateLimits(tokens_per_minute=1000))
    await limiter.admit(who, "r1", 1, 1)
    assert limiter.refusal_known(who) is None
    clock.advance(10)
    await refusal(limiter, who)
    asked = len(store.asked)
    clock.advance(49.999)
    known = limiter.refusal_known(who)
    assert known is not None
    assert known.retry_after_s == pytest.approx(0.001, abs=1e-5)
    assert known.headers[b"x-ratelimit-reset-requests"] == b"1ms"
    # The store is not asked either when a body was read all the same.
    assert (await refusal(limiter, who)).retry_after_s == pytest.approx(0.001, abs=1e-5)
    assert len(store.asked) == asked
    clock.advance(0.001)
    assert limiter.refusal_known(who) is None
    await limiter.admit(who, "r2", 1, 1)


async def test_only_what_time_alone_frees_is_known(limiter: Limiter) -> None:
    by_tokens = identity(RateLimits(tokens_per_minute=10))
    ticket = await limiter.admit(by_tokens, "r1", 5, 5)
    await refusal(limiter, by_tokens)
    assert limiter.refusal_known(by_tokens) is None
    by_slots = identity(RateLimits(concurrency=1))
    slot = await limiter.admit(by_slots, "r2", 1, 1)
    await refusal(limiter, by_slots)
    assert limiter.refusal_known(by_slots) is None
    ticket.cancel()
    slot.cancel()


async def test_a_limit_that_was_raised_is_asked_for_again(limiter: Limiter) -> None:
    await limiter.admit(identity(RateLimits(requests_per_minute=1)), "r1", 1, 1)
    await refusal(limiter, identity(RateLimits(requests_per_minute=1)))
    raised = identity(RateLimits(requests_per_minute=2))
    assert limiter.refusal_known(raised) is None
    await limiter.admit(raised, "r2", 1, 1)


async def test_known_refusals_are_bounded(limiter: Limiter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "MAX_KEPT", 3)
    keys = [Identity(tenant="t", key_id=str(n), method="key", key_limits=RateLimits(1)) for n in range(5)]
    for number, who in enumerate(keys):
        await limiter.admit(who, f"r{number}", 1, 1)
        await refusal(limiter, who)
    assert [limiter.refusal_known(who) is not None for who in keys] == [False, False, True, True, True]


async def test_leases_are_renewed_in_the_background(store: CountingStore, clock: Clock) -> None:
    limiter = Limiter(store, GatewayConfig(), Recorder(), clock, lease_s=0.03)
    await limiter.start()
    ticket = await limiter.admit(identity(RateLimits(concurrency=1)), "r1", 1, 1)
    await until(lambda: store.asked.count("renew 1") >= 3)
    ticket.settle(1, 1)
    await limiter.flush()
    store.asked.clear()
    while len(store.asked) < 2:
        other = await limiter.admit(identity(RateLimits(requests_per_minute=9)), f"r{len(store.asked)}", 1, 1)
        other.settle(1, 1)
        await asyncio.sleep(0.02)
    assert not [asked for asked in store.asked if asked.startswith("renew")]
    await limiter.close()


async def test_what_is_settled_while_the_store_is_away_is_settled_later(
    limiter: Limiter, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.serving.gateway.limits.settler.RETRY_INTERVAL_S", 0.01)
    who = identity(RateLimits(concurrency=1))
    ticket = await limiter.admit(who, "r1", 1, 1)
    store.away = True
    ticket.settle(1, 1)
    await limiter.flush()
    await refusal(limiter, who)
    store.away = False
    settles = store.asked.count("settle")
    await until(lambda: store.asked.count("settle") > settles)
    await limiter.admit(who, "r2", 1, 1)


async def test_settlements_that_wait_are_bounded(
    store: CountingStore, clock: Clock, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.serving.gateway.limits.settler.MAX_PENDING", 10)
    limiter = Limiter(store, GatewayConfig(), recorder, clock)
    tickets = [await limiter.admit(identity(RateLimits(concurrency=99)), f"r{n}", 1, 1) for n in range(15)]
    for ticket in tickets:
        ticket.settle(1, 1)
    await limiter.close()
    assert store.asked.count("settle") == 10
    assert recorder.value(metrics.STORE_ERRORS, "limits", "settle") == 5


async def test_a_fault_in_the_store_frees_the_others(
    limiter: Limiter, store: CountingStore, caplog: pytest.LogCaptureFixture
) -> None:
    who = identity(RateLimits(concurrency=2))
    first, second = await limiter.admit(who, "r1", 1, 1), await limiter.admit(who, "r2", 1, 1)
    settle, store.settle = store.settle, broken_settle  # type: ignore[method-assign]
    first.settle(1, 1)
    await limiter.flush()
    store.settle = settle  # type: ignore[method-assign]
    second.settle(1, 1)
    await limiter.admit(who, "r3", 1, 1)
    assert "could not be settled" in caplog.text


async def broken_settle(reservation: Reservation, tokens: int) -> None:
    raise RuntimeError("a bug")


async def test_closing_settles_what_waits(store: CountingStore, clock: Clock) -> None:
    limiter = Limiter(store, GatewayConfig(), Recorder(), clock)
    await limiter.start()
    who = identity(RateLimits(concurrency=200))
    for ticket in [await limiter.admit(who, f"r{n}", 1, 1) for n in range(200)]:
        ticket.settle(1, 1)
    await limiter.close()
    await limiter.close()
    assert store.asked.count("settle") == 200


def test_estimate_of_prompts() -> None:
    limiter = build_limiter(GatewayConfig(), Recorder(), redis=None, shared=None)
    sampling = SamplingParams(max_tokens=7)
    assert limiter.estimate([TokensPrompt([1, 2, 3])], sampling) == (3, 7)
    assert limiter.estimate([TokensPrompt([])], sampling) == (1, 7)
    assert limiter.estimate([TextPrompt("")], sampling) == (1, 7)
    assert limiter.estimate([TextPrompt("abcdefg")], sampling) == (3, 7)
    assert limiter.estimate([TextPrompt("日本語")], sampling) == (3, 7)
    assert limiter.estimate([TextPrompt("\ud800")], sampling) == (1, 7)
    parts = [{"type": "text", "text": "abcdef"}, {"type": "image_url"}, {"type": "text", "text": "abc"}]
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "abc"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
    ]
    assert limiter.estimate([ChatPrompt(messages)], sampling) == (3 * 4 + 1 + 3, 7)


def test_estimate_of_output() -> None:
    limiter = build_limiter(GatewayConfig(reserve_output_tokens=100), Recorder(), redis=None, shared=None)
    prompts = [TokensPrompt([1]), TokensPrompt([1, 2])]
    assert limiter.estimate(prompts, SamplingParams()) == (3, 200)
    assert limiter.estimate(prompts, SamplingParams(n=3)) == (3, 600)
    assert limiter.estimate(prompts, SamplingParams(n=3, max_tokens=2)) == (3, 12)
    assert limiter.estimate(prompts, SamplingParams(max_tokens=0)) == (3, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, b"0s"),
        (0.0001, b"1ms"),
        (0.25, b"250ms"),
        (0.9999, b"1s"),
        (1, b"1s"),
        (7.66, b"7.66s"),
        (59.9999, b"1m0s"),
        (60, b"1m0s"),
        (86.4, b"1m26.4s"),
        (360, b"6m0s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: bytes) -> None:
    assert format_duration(seconds) == text


def test_limits_in_memory_load_no_redis() -> None:
    code = "import sys, penstock.serving.gateway.limits.limiter; print('redis' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
