"""Shares of tenants: who comes first, who makes room, and what service adds up to, in steps of a fake executor."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.types import EngineRequest, LiveLimits, SamplingParams
from penstock.engine.engine import Engine
from penstock.engine.fairness import FairShares
from penstock.testing.builders import Collector, make_engine, make_request, run_to_end
from penstock.testing.fake_executor import FakeExecutor
from penstock.testing.fake_model import expected_tokens

VOCAB = 997


@pytest.fixture(params=[1, 2])
def depth(request: pytest.FixtureRequest) -> int:
    value = request.param
    assert isinstance(value, int)
    return value


def tokens(max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0, n=n)


def prompt(length: int, start: int) -> list[int]:
    return [(start * 31 + 7 * position) % VOCAB for position in range(length)]


@dataclass(frozen=True)
class Limits:
    """Limits of an engine under test."""

    seqs: int = 8
    tokens: int = 32
    prefill: int = 32
    blocks: int = 256

    def engine(self, depth: int = 1) -> Engine:
        return make_engine(
            FakeExecutor(num_blocks=self.blocks, max_inflight=depth),
            max_num_seqs=self.seqs,
            max_num_batched_tokens=self.tokens,
            max_prefill_tokens_while_decoding=self.prefill,
        )


class Load:
    """An engine with requests of several tenants, stepped one at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.collector = Collector()
        self.requests: dict[str, EngineRequest] = {}
        self.steps = 0
        self.first_token: dict[str, int] = {}
        self.served: Counter[str] = Counter()
        self._random = random.Random(7)

    def add(self, tenant: str, length: int = 8, output: int = 8, *, weight: float = 1.0, n: int = 1) -> str:
        number = len(self.requests)
        request = make_request(
            prompt(length, number),
            sampling=tokens(output, n),
            tenant=tenant,
            weight=weight,
            request_id=f"{tenant}-{number}",
        )
        self.requests[request.request_id] = request
        assert self.engine.add(request) == []
        return request.request_id

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            deltas = self.engine.step()
            self.steps += 1
            self.collector.take(deltas)
            for _, delta in deltas:
                self.first_token.setdefault(delta.request_id, self.steps)
                self.served[delta.request_id.partition("-")[0]] += len(delta.token_ids)
            self.engine.check_integrity()

    def steps_to_first_token(self, request_id: str, most: int = 200) -> int:
        begun = self.steps
        while request_id not in self.first_token:
            assert self.steps - begun < most, f"{request_id} has no token after {most} steps"
            self.step()
        return self.first_token[request_id] - begun

    def running(self, tenant: str) -> int:
        return sum(request.tenant == tenant for request in self.engine.scheduler.running)

    def check_answers(self) -> None:
        """Whatever was displaced on the way, each request gets the tokens of its solo run, once."""
        run_to_end(self.engine, self.collector)
        for request_id, request in self.requests.items():
            for index in range(request.sampling.n):
                expected = expected_tokens(request.prompt_token_ids, request.sampling, VOCAB, index)
                assert self.collector.tokens[request_id, index] == expected
        assert self.engine.stats().kv_blocks_used == 0


def solo(length: int, depth: int, limits: Limits = Limits()) -> int:
    """Steps to the first token on an idle engine."""
    load = Load(limits.engine(depth))
    return load.steps_to_first_token(load.add("small", length))


# ---- a small tenant beside a large one ----


def test_a_small_tenant_is_admitted_before_the_queue_of_a_large_one(depth: int) -> None:
    limits = Limits(seqs=4)
    load = Load(limits.engine(depth))
    for _ in range(50):
        load.add("large", output=12)
    load.step(5)
    waited = load.steps_to_first_token(load.add("small"))
    assert waited <= solo(8, depth, limits) + 2
    load.check_answers()


def test_places_are_freed_for_a_tenant_that_holds_less(depth: int) -> None:
    """Nobody ends for a long time: only preemption makes room."""
    load = Load(make_engine(FakeExecutor(num_blocks=512, max_inflight=depth), max_num_seqs=8))
    for _ in range(50):
        load.add("large", output=100)
    load.step(10)
    for already in range(4):
        assert load.running("large") == 8 - already
        waited = load.steps_to_first_token(load.add("small", output=100))
        assert waited <= solo(8, depth) + 2
    assert (load.running("large"), load.running("small")) == (4, 4)
    preemptions = load.engine.stats().preemptions
    load.add("small", output=100)
    load.step(20)
    assert (load.running("large"), load.running("small")) == (4, 4), "it has its share"
    assert load.engine.stats().preemptions == preemptions, "and nobody is displaced back"
    load.check_answers()


def test_blocks_are_freed_for_a_tenant_that_holds_less(depth: int) -> None:
    load = Load(make_engine(FakeExecutor(num_blocks=40, max_inflight=depth), prefix_caching=False))
    for _ in range(20):
        load.add("large", length=16, output=40)
    load.step(6)
    assert load.engine.stats().kv_blocks_used > 32
    preemptions = load.engine.stats().preemptions
    waited = load.steps_to_first_token(load.add("small", length=32))
    assert waited <= solo(32, depth) + 2 + (depth - 1)
    assert load.engine.stats().preemptions - preemptions <= 3, "as many as hold what it needs"
    load.check_answers()


def test_a_prompt_is_computed_in_the_middle_of_another_tenants_long_one(depth: int) -> None:
    limits = Limits(tokens=16, prefill=8)
    load = Load(limits.engine(depth))
    load.add("large", length=8, output=200)
    for _ in range(3):
        load.add("large", length=200, output=2)
    load.step(6)
    waited = load.steps_to_first_token(load.add("small", length=8))
    assert waited <= solo(8, depth, limits) + 2
    load.check_answers()


def test_a_step_too_small_for_all_is_shared_between_those_that_decode() -> None:
    load = Load(make_engine(max_num_batched_tokens=16, max_num_seqs=16))
    for _ in range(12):
        load.add("large", length=1, output=120)
    for _ in range(4):
        load.add("small", length=1, output=120)
    load.step(4)
    load.engine.configure(LiveLimits(max_num_batched_tokens=4))
    before = Counter(load.served)
    load.step(100)
    grown = load.served - before
    assert grown["small"] == pytest.approx(grown["large"], rel=0.1)
    load.check_answers()


@pytest.mark.parametrize("seed", range(2))
def test_first_tokens_of_a_small_tenant_under_fifty_times_its_load(seed: int, depth: int) -> None:
    """Both arrive at random; the large one asks for more than the engine can do. The p95 stays within solo + 2 steps."""
    draw = random.Random(seed)
    limits = Limits(seqs=16, tokens=64, prefill=32)
    load = Load(limits.engine(depth))
    small: dict[str, tuple[int, int]] = {}
    for _ in range(800):
        for _ in range(draw.choice([0, 1, 1, 2])):
            if load.engine.stats().waiting < 300:
                load.add("large", length=draw.randint(4, 40), output=draw.randint(10, 40))
        if draw.random() < 1 / 50:
            length = draw.randint(4, 24)
            small[load.add("small", length=length, output=20)] = (length, load.steps)
        load.step()
    run_to_end_of_small(load, small)
    late = sorted(
        load.first_token[name] - added - solo(length, depth, limits) for name, (length, added) in small.items()
    )
    assert len(late) > 8
    assert late[int(0.95 * (len(late) - 1))] <= 2, late
    assert max(late) <= 5
    assert load.engine.stats().waiting > 250, "the large tenant was never satisfied"


def run_to_end_of_small(load: Load, small: dict[str, tuple[int, int]]) -> None:
    for name in small:
        load.steps_to_first_token(name)


# ---- what service adds up to ----


def backlog(load: Load, tenants: dict[str, tuple[float, int, int]], steps: int) -> dict[str, float]:
    """Computed tokens of tenants (weight, prompt, output) that always have requests waiting, each as a part of all."""
    for _ in range(steps):
        for tenant, (weight, length, output) in tenants.items():
            while load.engine.scheduler.policy.num_waiting_of(tenant) < 3:
                load.add(tenant, length, output, weight=weight)
        load.step()
    computed: Counter[str] = Counter()
    for name, request in load.requests.items():
        made = len(load.collector.tokens.get((name, 0), ()))
        computed[request.tenant] += made + len(request.prompt_token_ids) * (made > 0)
    return {tenant: computed[tenant] / computed.total() for tenant in tenants}


@pytest.mark.parametrize(
    "tenants",
    [
        {"a": (1.0, 8, 8), "b": (1.0, 8, 8)},
        {"a": (1.0, 8, 8), "b": (3.0, 8, 8)},
        {"a": (1.0, 4, 20), "b": (1.0, 20, 4)},
        {"a": (2.0, 4, 20), "b": (1.0, 20, 4), "c": (1.0, 8, 8)},
        {"a": (5.0, 10, 10), "b": (2.0, 4, 16), "c": (1.0, 16, 4), "d": (2.0, 8, 8)},
    ],
    ids=lambda tenants: "-".join(f"{weight:g}:{length}+{output}" for weight, length, output in tenants.values()),
)
def test_tenants_that_always_want_more_get_service_by_weight(tenants: dict[str, tuple[float, int, int]]) -> None:
    load = Load(
        make_engine(
            FakeExecutor(num_blocks=256),
            max_num_seqs=12,
            max_num_batched_tokens=48,
            max_prefill_tokens_while_decoding=24,
            prefix_caching=False,
        )
    )
    shares = backlog(load, tenants, 600)
    total = sum(weight for weight, _, _ in tenants.values())
    for tenant, (weight, _, _) in tenants.items():
        assert shares[tenant] == pytest.approx(weight / total, rel=0.12), shares


def test_an_idle_tenant_saves_nothing_up() -> None:
    load = Load(make_engine(FakeExecutor(num_blocks=256), max_num_seqs=4))
    load.add("sleeper", output=2)
    both = {"worker": (1.0, 8, 8), "sleeper": (1.0, 8, 8)}
    backlog(load, {"worker": both["worker"]}, 300)
    before = Counter(load.served)
    backlog(load, both, 100)
    grown = load.served - before
    assert grown["sleeper"] == pytest.approx(grown["worker"], rel=0.2), "not the service of 300 steps first"


def test_nobody_pays_for_what_it_used_while_nobody_waited() -> None:
    load = Load(Limits(tokens=128).engine())
    for _ in range(300):
        if load.running("worker") + load.engine.scheduler.policy.num_waiting_of("worker") < 6:
            load.add("worker", length=16, output=8)
        load.step()
    assert load.engine.scheduler.policy.num_waiting_of("worker") == 0
    for _ in range(40):
        load.add("newcomer", length=16, output=8)
    before = Counter(load.served)
    backlog(load, {"newcomer": (1.0, 16, 8), "worker": (1.0, 16, 8)}, 100)
    grown = load.served - before
    assert grown["worker"] == pytest.approx(grown["newcomer"], rel=0.2)


def test_the_last_place_of_a_light_tenant_is_left_to_it() -> None:
    load = Load(Limits(seqs=4).engine())
    load.add("light", length=4, output=200, weight=0.01)
    load.step(2)
    for _ in range(6):
        load.add("heavy", length=4, output=100, weight=10.0)
    for _ in range(150):
        load.step()
        assert load.running("light") == 1
    load.check_answers()


def test_a_tenant_that_always_has_one_request_saves_nothing_up() -> None:
    """Its long stream keeps it in the engine, at a fraction of its share."""
    load = Load(make_engine(FakeExecutor(num_blocks=256), max_num_seqs=4))
    load.add("trickle", length=4, output=240)
    both = {"worker": (1.0, 8, 8), "trickle": (1.0, 8, 8)}
    backlog(load, {"worker": both["worker"]}, 200)
    before = Counter(load.served)
    backlog(load, both, 100)
    grown = load.served - before
    assert grown["trickle"] == pytest.approx(grown["worker"], rel=0.35)


def test_a_stream_of_new_tenants_does_not_starve_an_old_one() -> None:
    """They take all there is, each for one request; about four are there at a time, so a fifth is the old tenant's."""
    load = Load(Limits(seqs=4, tokens=64, prefill=64).engine())
    for number in range(500):
        while load.engine.scheduler.num_waiting - load.engine.scheduler.policy.num_waiting_of("old") < 2:
            load.add(f"new{len(load.requests)}", length=16, output=4)
        while load.engine.scheduler.policy.num_waiting_of("old") < 2:
            load.add("old", length=16, output=4)
        load.step()
        if number == 200:
            before = load.served["old"]
    assert load.served["old"] - before > 0.1 * sum(load.served.values()) * 300 / 500


def test_what_a_preemption_makes_the_engine_compute_again_is_not_charged() -> None:
    """The large tenant is displaced over and over; were it charged for that, its share would shrink."""
    load = Load(make_engine(FakeExecutor(num_blocks=256), max_num_seqs=4, prefix_caching=False))
    tenants = {"large": (1.0, 24, 24), "small": (1.0, 24, 24)}
    for _ in range(120):
        if load.steps % 8 == 0:
            load.add("small", 24, 4)
        while load.engine.scheduler.policy.num_waiting_of("large") < 3:
            load.add("large", 24, 24)
        load.step()
    assert load.engine.stats().preemptions > 3
    before = Counter(load.served)
    backlog(load, tenants, 300)
    grown = load.served - before
    assert grown["small"] == pytest.approx(grown["large"], rel=0.15)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
@pytest.mark.parametrize("seed", [25, 57, 103, 211, 260])
def test_tenants_do_not_take_memory_from_each_other_for_ever(seed: int, in_flight: int) -> None:
    """A prompt that another one overtakes keeps its claim on the blocks that it needs to go on; with these seeds two tenants otherwise
    preempt each other in every step and never end."""
    draw = random.Random(seed)
    engine = make_engine(
        FakeExecutor(num_blocks=14, max_inflight=in_flight, vocab_size=61),
        max_num_batched_tokens=3,
        max_prefill_tokens_while_decoding=19,
        max_num_seqs=3,
    )
    collector = Collector()
    for number in range(8):
        token_ids = [(number % 3 + place * place) % 61 for place in range(draw.randint(8, 28))]
        engine.add(make_request(token_ids, tenant=draw.choice("ab"), sampling=tokens(draw.randint(4, 16))))
        for _ in range(draw.randint(0, 9)):
            collector.take(engine.step())
    run_to_end(engine, collector, max_steps=500)
    assert len(collector.final) == 8


# ---- bounds ----


def test_tenants_without_requests_are_forgotten() -> None:
    policy = FairShares()
    engine = make_engine(max_num_seqs=2)
    engine.scheduler.policy = policy
    for number in range(300):
        engine.add(make_request(tenant=f"tenant-{number}", sampling=tokens(1)))
        if number % 3 == 0:
            engine.abort(b"", next(reversed(engine.scheduler.requests.values())).request_id)
        engine.step()
        assert len(policy._tenants) <= len(engine.scheduler.requests)
        assert len(policy._heap) <= 2 * len(engine.scheduler.requests) + 66
    run_to_end(engine)
    assert policy._tenants == {}
    assert policy._debts == {}


def test_a_tenant_that_stops_waiting_among_many_that_leave_is_found_again() -> None:
    """Entries of tenants that no longer wait are swept; one that still runs must be able to wait again."""
    load = Load(make_engine(max_num_seqs=2))
    load.add("runner", length=24, output=60)
    load.add("large", output=60)
    load.step(3)
    for _ in range(3):
        load.add("large", output=60)
    passing = [load.add("runner", output=2), *(load.add(f"passing{number}") for number in range(200))]
    for name in passing:
        load.engine.abort(b"", name)
        del load.requests[name]
    load.add("runner", output=2)
    load.check_answers()


def test_one_tenant_cannot_fill_the_queue() -> None:
    engine = make_engine(max_num_seqs=1, max_waiting_requests=64)
    engine.add(make_request(sampling=tokens(100), tenant="large"))
    engine.step()
    outcomes = [engine.add(make_request(tenant="large")) for _ in range(64)]
    refused = [outcome[0][1] for outcome in outcomes if outcome]
    assert len(refused) == 8
    assert refused[0].error is not None
    assert refused[0].error.status == 503
    assert engine.add(make_request(tenant="small")) == []


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-300])
def test_a_weight_that_makes_no_sense_harms_nobody(weight: float) -> None:
    load = Load(make_engine(max_num_seqs=2))
    for _ in range(10):
        load.add("odd", weight=weight)
        load.add("normal")
    load.check_answers()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), depth=st.sampled_from([1, 2, 4]))
def test_every_waiting_request_runs_within_a_bound(seed: int, depth: int) -> None:
    """Five tenants with any weights and sizes, three of them with a backlog that never ends: whoever waits is served in the end, the
    tighter the smaller its tenant's own backlog."""
    draw = random.Random(seed)
    engine = make_engine(
        FakeExecutor(num_blocks=draw.randint(40, 120), max_inflight=depth),
        max_num_seqs=draw.randint(2, 8),
        max_num_batched_tokens=draw.randint(12, 48),
        max_prefill_tokens_while_decoding=draw.randint(4, 24),
        prefix_caching=draw.random() < 0.5,
    )
    load = Load(engine)
    greedy = {f"greedy{i}": draw.choice([0.5, 1.0, 4.0]) for i in range(3)}
    modest = {f"modest{i}": draw.choice([0.5, 1.0, 4.0]) for i in range(2)}
    pending: dict[str, str] = {}
    for _ in range(250):
        for tenant, weight in greedy.items():
            while engine.scheduler.policy.num_waiting_of(tenant) < 4:
                load.add(tenant, draw.randint(1, 40), draw.randint(1, 30), weight=weight, n=draw.choice([1, 1, 2]))
        for tenant, weight in modest.items():
            name = pending.get(tenant)
            if name is None or (name, 0) in load.collector.final:
                pending[tenant] = load.add(tenant, draw.randint(1, 20), draw.randint(1, 10), weight=weight)
        load.step()
    for name in pending.values():
        load.steps_to_first_token(name, most=150)
    for tenant in (*greedy, *modest):
        assert load.served[tenant] > 0, f"{tenant} got nothing in {load.steps} steps: {load.served}"
    load.check_answers()
