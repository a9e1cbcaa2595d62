"""The stores against a naive model: a list of everything that was ever admitted, searched from end to end."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock.serving.gateway.limits.interface import LEASE_S, WINDOW_S, LimitStore, Reservation, Subject, Verdict
from penstock.serving.gateway.limits.local_store import LocalLimitStore
from tests.serving.gateway.limits.limit_clock import Clock

MICRO = 1_000_000
WINDOW, LEASE = int(WINDOW_S * MICRO), int(LEASE_S * MICRO)


@dataclass
class Admission:
    at: int
    request_id: str
    tokens: int


@dataclass
class Held:
    reservation: Reservation
    tokens_of: list[Admission]
    until: int


@dataclass
class Model:
    """Times are microseconds."""

    requests: dict[str, list[Admission]] = field(default_factory=dict)
    slots: dict[str, dict[str, int]] = field(default_factory=dict)
    held: dict[str, list[Admission]] = field(default_factory=dict)

    def within(self, name: str, now: int) -> list[Admission]:
        return [admission for admission in self.requests.get(name, []) if now - admission.at < WINDOW]

    def running(self, name: str, now: int) -> int:
        return sum(until > now for until in self.slots.get(name, {}).values())

    def fits(self, subject: Subject, tokens: int, now: int) -> bool:
        within = self.within(subject.name, now)
        return (
            (subject.requests_per_minute is None or len(within) < subject.requests_per_minute)
            and (
                subject.tokens_per_minute is None
                or not tokens
                or sum(admission.tokens for admission in within) + tokens <= subject.tokens_per_minute
            )
            and (subject.concurrency is None or self.running(subject.name, now) < subject.concurrency)
        )

    def windows_fit_at(self, reservation: Reservation, now: int) -> bool:
        return all(
            self.fits(Subject(s.name, s.requests_per_minute, s.tokens_per_minute, None), reservation.tokens, now)
            for s in reservation.subjects
        )

    def charge(self, reservation: Reservation, now: int) -> None:
        made = []
        for subject in reservation.subjects:
            admission = Admission(now, reservation.request_id, reservation.tokens)
            self.requests.setdefault(subject.name, []).append(admission)
            made.append(admission)
            if subject.concurrency is not None:
                self.slots.setdefault(subject.name, {})[reservation.request_id] = now + LEASE
        self.held[reservation.request_id] = made

    def settle(self, reservation: Reservation, tokens: int) -> None:
        for admission in self.held.pop(reservation.request_id, []):
            admission.tokens = tokens
        for subject in reservation.subjects:
            self.slots.get(subject.name, {}).pop(reservation.request_id, None)

    def renew(self, reservation: Reservation, now: int) -> None:
        for subject in reservation.subjects:
            if subject.concurrency is not None:
                self.slots.setdefault(subject.name, {})[reservation.request_id] = now + LEASE


class Comparison:
    """A store and the model side by side. Whatever the model says must be what the store says."""

    def __init__(self, store: LimitStore, clock: Clock, subjects: list[Subject]) -> None:
        self.store = store
        self.clock = clock
        self.subjects = subjects
        self.model = Model()
        self.known: list[Reservation] = []
        self.running: dict[str, Reservation] = {}

    @property
    def now(self) -> int:
        return round(self.clock() * MICRO)

    async def admit(self, chosen: list[Subject], tokens: int) -> None:
        smallest = min((s.tokens_per_minute for s in chosen if s.tokens_per_minute is not None), default=tokens)
        reservation = Reservation(f"r{len(self.known)}", "t", chosen, min(tokens, smallest))
        self.known.append(reservation)
        model, now = self.model, self.now
        verdict = await self.store.admit(reservation)
        fits = all(model.fits(subject, reservation.tokens, now) for subject in chosen)
        assert verdict.allowed == fits
        if fits:
            model.charge(reservation, now)
            self.running[reservation.request_id] = reservation
        else:
            wait = round(verdict.retry_after_s * MICRO)
            assert model.windows_fit_at(reservation, now + wait)
            assert wait == 0 or not model.windows_fit_at(reservation, now + wait - 1)
            assert (wait == 0) == (verdict.refused_by == "concurrency")
        self.check_windows(chosen, verdict)

    def check_windows(self, chosen: list[Subject], verdict: Verdict) -> None:
        within = {subject.name: self.model.within(subject.name, self.now) for subject in chosen}
        assert (verdict.requests and verdict.requests.remaining) == min(
            (max(0, s.requests_per_minute - len(within[s.name])) for s in chosen if s.requests_per_minute is not None),
            default=None,
        )
        assert (verdict.tokens and verdict.tokens.remaining) == min(
            (
                max(0, s.tokens_per_minute - sum(admission.tokens for admission in within[s.name]))
                for s in chosen
                if s.tokens_per_minute is not None
            ),
            default=None,
        )

    async def repeat(self) -> None:
        """An admission whose answer was lost, a moment ago."""
        if self.running:
            reservation = list(self.running.values())[-1]
            (first, *_) = self.model.held[reservation.request_id]
            if self.now - first.at < LEASE / 2:
                assert (await self.store.admit(reservation)).allowed

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        await self.store.settle(reservation, tokens)
        self.model.settle(reservation, tokens)
        self.running.pop(reservation.request_id, None)

    async def renew(self) -> None:
        reservations = list(self.running.values())
        await self.store.renew(reservations)
        for reservation in reservations:
            self.model.renew(reservation, self.now)


SUBJECTS = [
    Subject("key:a", 3, 50, 2),
    Subject("key:b", 5, None, None),
    Subject("key:c", None, 40, 3),
    Subject("tenant:t", 6, 90, 4),
]
STEPS_S = [0.0, 0.000001, 0.5, 1.0, 4.999999, 5.0, 7.3, LEASE_S, 30.0, WINDOW_S]


class LocalStoreMachine(RuleBasedStateMachine):
    """Everything that may happen, in every order that hypothesis thinks of."""

    @initialize()
    def begin(self) -> None:
        clock = Clock()
        self.loop = asyncio.new_event_loop()
        self.pair = Comparison(LocalLimitStore(clock), clock, SUBJECTS)

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.close()

    @rule(seconds=st.sampled_from(STEPS_S))
    def wait(self, seconds: float) -> None:
        self.pair.clock.advance(seconds)

    @rule(key=st.sampled_from(SUBJECTS[:3]), with_tenant=st.booleans(), tokens=st.integers(0, 60))
    def admit(self, key: Subject, with_tenant: bool, tokens: int) -> None:
        chosen = [key, SUBJECTS[3]] if with_tenant else [key]
        self.loop.run_until_complete(self.pair.admit(chosen, tokens))

    @rule()
    def repeat(self) -> None:
        self.loop.run_until_complete(self.pair.repeat())

    @rule(data=st.data(), tokens=st.integers(0, 200))
    def settle(self, data: st.DataObject, tokens: int) -> None:
        if self.pair.known:
            reservation = data.draw(st.sampled_from(self.pair.known))
            self.loop.run_until_complete(self.pair.settle(reservation, tokens))

    @rule()
    def renew(self) -> None:
        self.loop.run_until_complete(self.pair.renew())

    @invariant()
    def nothing_is_above_its_limit(self) -> None:
        if hasattr(self, "pair"):
            for subject in SUBJECTS:
                within = self.pair.model.within(subject.name, self.pair.now)
                assert subject.requests_per_minute is None or len(within) <= subject.requests_per_minute


TestLocalStoreMachine = LocalStoreMachine.TestCase
TestLocalStoreMachine.settings = settings(max_examples=40, stateful_step_count=50, deadline=None, derandomize=True)


@pytest.mark.parametrize("seed", range(6))
async def test_random_walk(store: LimitStore, clock: Clock, seed: int) -> None:
    """The same comparison on both stores."""
    rng = random.Random(seed)
    pair = Comparison(store, clock, SUBJECTS)
    for _ in range(250):
        action = rng.random()
        if action < 0.25:
            clock.advance(rng.choice(STEPS_S[:-2]) * rng.random())
        elif action < 0.7:
            key = rng.choice(SUBJECTS[:3])
            await pair.admit([key, SUBJECTS[3]] if rng.random() < 0.5 else [key], rng.randint(0, 60))
        elif action < 0.75:
            await pair.repeat()
        elif action < 0.95 and pair.known:
            await pair.settle(rng.choice(pair.known[-8:]), rng.randint(0, 100))
        else:
            await pair.renew()
    assert any(pair.model.requests.values())
