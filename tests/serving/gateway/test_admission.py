"""Admission: caps on requests and tokens in flight, shares of tenants, Retry-After from the rate at which requests end."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import OverloadedError
from penstock.core.gateway_config import GatewayConfig
from penstock.core.types import ModelInfo
from penstock.serving.gateway.admission import (
    DEFAULT_REQUESTS,
    GREED,
    Admission,
    AdmissionSlot,
    Capacity,
    capacity_of,
)
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

INFO = ModelInfo(
    architecture="fake",
    dtype="float32",
    device="cpu",
    vocab_size=100,
    max_model_len=256,
    eos_token_ids=(0,),
    num_parameters=0,
    weight_bytes=0,
    model_hash="fake",
    max_num_seqs=4,
    kv_cache_tokens=250,
)
OPAQUE = msgspec.structs.replace(INFO, max_num_seqs=0, kv_cache_tokens=0)


class Bench:
    """An Admission with a clock in the test's hand."""

    def __init__(self, requests: int = 0, tokens: int = 0, worker_share: float = 1.0) -> None:
        self.now = 100.0
        self.recorder = Recorder()
        config = GatewayConfig(max_inflight_requests=requests, max_inflight_tokens=tokens)
        self.admission = Admission(config, self.recorder, worker_share=worker_share, clock=lambda: self.now)

    def enter(self, tokens: int = 1, tenant: str = "", info: ModelInfo | None = OPAQUE) -> AdmissionSlot:
        return self.admission.enter("m", tokens, info, tenant=tenant)

    def fill(self, tokens: int = 1, tenant: str = "", info: ModelInfo | None = OPAQUE) -> list[AdmissionSlot]:
        """Enter until refused."""
        slots: list[AdmissionSlot] = []
        try:
            while True:
                slots.append(self.enter(tokens, tenant, info))
        except OverloadedError:
            return slots

    def refused(self, reason: str) -> float:
        return self.recorder.value(metrics.REFUSED, reason)


@pytest.mark.parametrize(
    ("info", "requests", "tokens", "share", "expected"),
    [
        (INFO, 0, 0, 1.0, Capacity(16, 1000)),
        (INFO, 7, 50, 1.0, Capacity(7, 50)),
        (OPAQUE, 0, 0, 1.0, Capacity(DEFAULT_REQUESTS, None)),
        (None, 0, 0, 1.0, Capacity(DEFAULT_REQUESTS, None)),
        (None, 3, 30, 1 / 3, Capacity(1, 10)),
        (INFO, 0, 0, 1 / 4, Capacity(4, 250)),
        (INFO, 2, 2, 1 / 8, Capacity(1, 1)),
        (INFO, 49, 49, 1 / 49, Capacity(1, 1)),
    ],
)
def test_caps_follow_the_settings_then_the_engine_then_the_default(
    info: ModelInfo | None, requests: int, tokens: int, share: float, expected: Capacity
) -> None:
    config = GatewayConfig(max_inflight_requests=requests, max_inflight_tokens=tokens)
    assert capacity_of(info, config, share) == expected


def test_requests_in_flight_are_bounded_and_a_place_left_is_free_again() -> None:
    bench = Bench(requests=3)
    slots = bench.fill()
    assert len(slots) == 3
    assert bench.refused("requests") == 1
    slots[1].leave()
    slots[1].leave()
    assert bench.admission.in_flight("m") == 2, "leaving twice gives one place back"
    assert len(bench.fill()) == 1


def test_tokens_in_flight_are_bounded_and_shown() -> None:
    bench = Bench(tokens=100)
    slots = [bench.enter(60), bench.enter(40)]
    assert bench.recorder.value(metrics.INFLIGHT_TOKENS, "m") == 100
    with pytest.raises(OverloadedError) as caught:
        bench.enter(1)
    assert caught.value.info.status == 503
    assert caught.value.info.code == "overloaded"
    assert bench.refused("tokens") == 1
    for slot in slots:
        slot.leave()
    assert bench.recorder.value(metrics.INFLIGHT_TOKENS, "m") == 0


def test_a_request_above_the_cap_runs_alone() -> None:
    bench = Bench(tokens=100)
    big = bench.enter(5000)
    assert bench.fill() == []
    big.leave()
    small = bench.enter(1)
    with pytest.raises(OverloadedError):
        bench.enter(5000)
    small.leave()
    bench.enter(5000)


def test_models_do_not_share_a_cap() -> None:
    bench = Bench(requests=1)
    bench.enter()
    other = bench.admission.enter("other", 1, OPAQUE)
    assert bench.admission.in_flight("other") == 1
    other.leave()


def test_overloaded_says_when_nothing_at_all_would_be_let_in() -> None:
    bench = Bench(requests=2, tokens=100)
    assert not bench.admission.overloaded("m"), "a model that nobody used has room"
    first = bench.enter(50)
    assert not bench.admission.overloaded("m")
    second = bench.enter(50)
    assert bench.admission.overloaded("m")
    error = bench.admission.refuse("m")
    assert 1 <= error.retry_after_s <= 30
    assert bench.refused("requests") == 1
    second.leave()
    assert not bench.admission.overloaded("m")
    first.leave()
    bench.enter(100)
    assert bench.admission.overloaded("m"), "one request with all the tokens"
    bench.admission.refuse("m")
    assert bench.refused("tokens") == 1


def test_one_tenant_cannot_fill_the_engine() -> None:
    bench = Bench(requests=16)
    hog = bench.fill(tenant="hog")
    assert len(hog) == 14, "seven eighths"
    assert bench.refused("tenant") == 1
    bench.enter(tenant="small").leave()
    assert not bench.admission.overloaded("m")


def test_tenants_that_all_want_everything_get_equal_parts() -> None:
    bench = Bench(requests=150)
    held = {"a": 0, "b": 0}
    for _ in range(150):
        for tenant in held:
            try:
                bench.enter(tenant=tenant)
                held[tenant] += 1
            except OverloadedError:
                pass
    assert held == {"a": 70, "b": 70}
    assert bench.enter(tenant="c"), "and the next one finds room"


def test_one_tenant_cannot_reserve_all_tokens() -> None:
    bench = Bench(tokens=1600)
    assert len(bench.fill(100, tenant="hog")) == 14
    bench.enter(100, tenant="small")
    bench.enter(100, tenant="third")
    with pytest.raises(OverloadedError):
        bench.enter(100, tenant="fourth")


def test_without_tenants_all_of_the_cap_can_be_used() -> None:
    assert len(Bench(requests=16).fill()) == 16
    assert len(Bench(tokens=1600).fill(100)) == 16


@pytest.mark.parametrize("requests", [1, 2, 7])
def test_a_small_cap_is_not_made_smaller_for_a_tenant(requests: int) -> None:
    assert len(Bench(requests=requests).fill(tenant="a")) == requests


def test_retry_after_follows_the_rate_at_which_requests_end() -> None:
    bench = Bench(requests=40)
    slots = bench.fill()
    for _ in range(20):  # two a second
        bench.now += 0.5
        slots.pop(0).leave()
        slots.append(bench.enter())
    with pytest.raises(OverloadedError) as caught:
        bench.enter()
    assert caught.value.retry_after_s == pytest.approx(10, rel=0.1), "half of 40 at two a second"
    assert f"{caught.value.retry_after_s:.0f} s" in caught.value.message


def test_the_rate_of_a_quiet_time_does_not_count() -> None:
    bench = Bench(requests=40)
    for _ in range(200):  # one request every ten seconds
        bench.now += 10
        bench.enter().leave()
    bench.now += 10
    bench.fill()
    assert bench.admission.refuse("m").retry_after_s == 1


def test_retry_after_is_bounded() -> None:
    bench = Bench(requests=2)
    slots = bench.fill()
    assert bench.admission.refuse("m").retry_after_s == 1, "nothing is known yet"
    bench.now += 12
    assert bench.admission.refuse("m").retry_after_s == pytest.approx(12), "nothing ended for twelve seconds"
    bench.now += 1000
    assert bench.admission.refuse("m").retry_after_s == 30
    for slot in slots:
        slot.leave()
    assert bench.admission.refuse("m").retry_after_s == 1, "nothing is in flight"


def test_what_is_kept_is_bounded() -> None:
    bench = Bench(requests=10)
    kept = bench.admission.enter("kept", 1, OPAQUE)
    for number in range(3000):
        slot = bench.admission.enter(f"model-{number}", 1, OPAQUE, tenant=f"tenant-{number}")
        slot.leave()
    assert bench.admission.in_flight("kept") == 1, "what is in flight is never forgotten"
    kept.leave()
    assert bench.admission.in_flight("kept") == 0
    series = list(bench.recorder.values(metrics.INFLIGHT_TOKENS))
    assert len(series) <= 513


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), requests=st.integers(1, 20), cap=st.integers(1, 200))
def test_counts_are_whole_whatever_comes_and_goes(seed: int, requests: int, cap: int) -> None:
    rng = random.Random(seed)
    bench = Bench(requests=requests, tokens=cap)
    held: list[tuple[AdmissionSlot, str, int]] = []
    for _ in range(200):
        bench.now += rng.random()
        if held and rng.random() < 0.4:
            slot, _, _ = held.pop(rng.randrange(len(held)))
            slot.leave()
        else:
            tenant, tokens = rng.choice("abc"), rng.randint(1, cap)
            others = [entry for entry in held if entry[1] == tenant]
            free = requests - len(held)
            try:
                held.append((bench.enter(tokens, tenant), tenant, tokens))
            except OverloadedError:
                assert held, "an idle engine takes anything"
            else:
                assert free > 0
                assert not others or len(others) < GREED * free
        assert bench.admission.in_flight("m") == len(held) <= requests
        used = sum(tokens for _, _, tokens in held)
        assert bench.recorder.value(metrics.INFLIGHT_TOKENS, "m") == used
        assert used <= cap or len(held) == 1
