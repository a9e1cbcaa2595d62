"""Priority with ageing, displacement, and the bound on waiting, through the engine with a clock in the test's hand."""

from __future__ import annotations

import itertools

import pytest

from penstock.core.errors import ConfigError
from penstock.core.types import SamplingParams
from penstock.engine.engine import Engine
from penstock.engine.policy import AGEING_S, MAX_PRIORITY, make_policy
from penstock.testing.builders import Collector, make_engine, make_request, run_to_end
from penstock.testing.fake_executor import FakeExecutor
from penstock.testing.fake_model import expected_tokens

VOCAB = 997


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tokens(max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0, n=n)


def order_of_ends(collector: Collector) -> list[str]:
    return [request_id for request_id, _ in collector.final]


def steps(engine: Engine, collector: Collector, count: int) -> None:
    for _ in range(count):
        collector.take(engine.step())
        engine.check_integrity()


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="fair, priority, fcfs, not 'lottery'"):
        make_policy("lottery")


@pytest.mark.parametrize("policy", ["fair", "priority"])
def test_priority_orders_those_that_wait(policy: str) -> None:
    engine = make_engine(max_num_seqs=1, policy=policy, clock=Clock())
    for name, priority in (("running", -9), ("late", 2), ("early", -1), ("middle", 0), ("middle too", 0)):
        engine.add(make_request(request_id=name, priority=priority))
        if name == "running":
            engine.step()
    done = run_to_end(engine)
    assert order_of_ends(done) == ["running", "early", "middle", "middle too", "late"]


@pytest.mark.parametrize("policy", ["fair", "priority"])
def test_a_waiting_request_gains_a_level_each_ageing_period(policy: str) -> None:
    clock = Clock()
    engine = make_engine(max_num_seqs=1, policy=policy, clock=clock)
    engine.add(make_request(request_id="running", priority=-9))
    engine.step()
    engine.add(make_request(request_id="patient", priority=3))
    clock.now += 2.9 * AGEING_S
    engine.add(make_request(request_id="before", priority=0))
    clock.now += 0.2 * AGEING_S
    engine.add(make_request(request_id="after", priority=0))
    done = run_to_end(engine)
    assert order_of_ends(done) == ["running", "before", "patient", "after"]


@pytest.mark.parametrize("policy", ["fair", "priority"])
def test_nothing_starves_behind_a_stream_of_urgent_requests(policy: str) -> None:
    clock = Clock()
    engine = make_engine(max_num_seqs=1, policy=policy, clock=clock)
    collector = Collector()
    engine.add(make_request(request_id="background", priority=2**31 - 1, sampling=tokens(1)))
    waited = 0.0
    while ("background", 0) not in collector.final:
        engine.add(make_request(priority=0, sampling=tokens(2)))
        steps(engine, collector, 2)
        clock.now += 5.0
        waited += 5.0
        assert waited <= MAX_PRIORITY * AGEING_S + 30
    assert waited > (MAX_PRIORITY - 1) * AGEING_S, "priority counts for as long as it may"


@pytest.mark.parametrize("policy", ["fair", "priority"])
@pytest.mark.parametrize("depth", [1, 2])
def test_an_urgent_request_displaces_the_least_urgent_running_one(policy: str, depth: int) -> None:
    executor = FakeExecutor(max_inflight=depth)
    engine = make_engine(executor, max_num_seqs=2, policy=policy, clock=Clock())
    collector = Collector()
    for name, priority in (("normal", 0), ("background", 5)):
        engine.add(make_request(request_id=name, priority=priority, sampling=tokens(30)))
    steps(engine, collector, 5)
    engine.add(make_request(request_id="urgent", priority=-1, sampling=tokens(3)))
    run_to_end(engine, collector)
    assert order_of_ends(collector) == ["urgent", "normal", "background"]
    assert engine.stats().preemptions == 1
    assert len(collector.tokens["background", 0]) == 30


@pytest.mark.parametrize("policy", ["fair", "priority"])
def test_an_aged_request_keeps_its_place(policy: str) -> None:
    clock = Clock()
    engine = make_engine(max_num_seqs=1, policy=policy, clock=clock)
    collector = Collector()
    engine.add(make_request(request_id="old", priority=2, sampling=tokens(10)))
    steps(engine, collector, 2)
    clock.now += 2 * AGEING_S + 1
    engine.add(make_request(request_id="new", priority=0))
    run_to_end(engine, collector)
    assert order_of_ends(collector) == ["old", "new"]
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize("policy", ["fair", "priority"])
def test_nobody_is_displaced_for_a_request_that_would_not_fit_all_the_same(policy: str) -> None:
    engine = make_engine(FakeExecutor(num_blocks=16), max_num_seqs=8, policy=policy, prefix_caching=False)
    collector = Collector()
    engine.add(make_request(range(20), request_id="equal", priority=0, sampling=tokens(20)))
    engine.add(make_request(range(8), request_id="background", priority=5, sampling=tokens(20)))
    steps(engine, collector, 3)
    engine.add(make_request(range(52), request_id="large", priority=0, sampling=tokens(2)))
    steps(engine, collector, 3)
    assert engine.stats().preemptions == 0
    run_to_end(engine, collector)
    assert set(order_of_ends(collector)) == {"equal", "background", "large"}


@pytest.mark.parametrize("policy", ["fair", "priority"])
def test_nobody_is_displaced_when_the_step_has_no_tokens_left_for_the_prompt(policy: str) -> None:
    engine = make_engine(
        max_num_seqs=2, max_num_batched_tokens=8, max_prefill_tokens_while_decoding=4, policy=policy, clock=Clock()
    )
    collector = Collector()
    engine.add(make_request(range(3), request_id="decoding", sampling=tokens(30)))
    steps(engine, collector, 2)
    engine.add(make_request(range(40), request_id="long", priority=-9, sampling=tokens(2)))
    steps(engine, collector, 2)
    engine.add(make_request(range(30), request_id="urgent", priority=-5, sampling=tokens(2)))
    steps(engine, collector, 3)
    assert engine.stats().preemptions == 0, "the running prompt takes the prompt tokens of these steps"
    run_to_end(engine, collector)
    assert order_of_ends(collector) == ["long", "urgent", "decoding"]


@pytest.mark.parametrize("policy", ["fair", "priority"])
def test_an_urgent_prompt_does_not_wait_for_the_rest_of_a_long_one(policy: str) -> None:
    engine = make_engine(max_num_batched_tokens=8, policy=policy, clock=Clock())
    collector = Collector()
    engine.add(make_request(range(100), request_id="long", sampling=tokens(2)))
    steps(engine, collector, 2)
    engine.add(make_request(range(8), request_id="urgent", priority=-1, sampling=tokens(2)))
    steps(engine, collector, 1)
    assert len(collector.tokens["urgent", 0]) == 1
    run_to_end(engine, collector)


# ---- the bound on waiting ----


@pytest.mark.parametrize("policy", ["fair", "priority", "fcfs"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_that_waits_too_long_ends_with_503_and_the_others_go_on(policy: str, depth: int) -> None:
    clock = Clock()
    engine = make_engine(FakeExecutor(max_inflight=depth), max_num_seqs=1, policy=policy, clock=clock)
    collector = Collector()
    running = make_request(sampling=tokens(40), queue_timeout_s=5.0)
    engine.add(running)
    steps(engine, collector, 2)
    waiting = make_request(queue_timeout_s=5.0)
    patient = make_request()
    engine.add(waiting)
    engine.add(patient)
    clock.now += 4.9
    assert engine.expire() == []
    clock.now += 0.2
    ((_, delta),) = engine.expire()
    assert delta.request_id == waiting.request_id
    assert delta.error is not None
    assert (delta.error.status, delta.error.code) == (503, "overloaded")
    assert engine.expire() == []
    run_to_end(engine, collector)
    assert collector.final[running.request_id, 0].finish_reason == "length"
    assert collector.final[patient.request_id, 0].finish_reason == "length"


def test_all_samples_of_a_request_that_never_began_end() -> None:
    clock = Clock()
    engine = make_engine(max_num_seqs=1, clock=clock)
    engine.add(make_request(sampling=tokens(40)))
    engine.step()
    request = make_request(sampling=tokens(4, n=3), queue_timeout_s=1.0)
    engine.add(request)
    clock.now += 1.5
    collector = Collector()
    collector.take(engine.expire())
    assert {index for _, index in collector.final} == {0, 1, 2}
    assert all(delta.error is not None and delta.error.status == 503 for delta in collector.final.values())
    engine.check_integrity()
    run_to_end(engine)


@pytest.mark.parametrize("leader_ends", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_samples_that_wait_for_a_place_are_not_late_once_the_first_has_begun(leader_ends: bool, depth: int) -> None:
    clock = Clock()
    engine = make_engine(FakeExecutor(max_inflight=depth), max_num_seqs=1, clock=clock)
    request = make_request(sampling=tokens(1 if leader_ends else 10, n=3), queue_timeout_s=1.0)
    engine.add(request)
    collector = Collector()
    steps(engine, collector, 1)
    clock.now += 60
    collector.take(engine.expire())
    run_to_end(engine, collector)
    for index in range(3):
        expected = expected_tokens(request.prompt_token_ids, request.sampling, VOCAB, index)
        assert collector.tokens[request.request_id, index] == expected


def test_a_preempted_request_is_not_late() -> None:
    clock = Clock()
    engine = make_engine(max_num_seqs=1, clock=clock)
    collector = Collector()
    engine.add(make_request(request_id="displaced", priority=1, sampling=tokens(20), queue_timeout_s=1.0))
    steps(engine, collector, 3)
    engine.add(make_request(request_id="urgent", priority=0, sampling=tokens(20)))
    steps(engine, collector, 2)
    assert engine.stats().preemptions == 1
    clock.now += 60
    collector.take(engine.expire())
    run_to_end(engine, collector)
    assert len(collector.tokens["displaced", 0]) == 20


def test_an_abort_while_waiting_frees_the_place_in_the_queue_at_once() -> None:
    engine = make_engine(max_num_seqs=1, max_waiting_requests=2)
    engine.add(make_request(sampling=tokens(40)))
    engine.step()
    waiting = [make_request(queue_timeout_s=9.0), make_request(queue_timeout_s=9.0)]
    for request in waiting:
        assert engine.add(request) == []
    (refused,) = engine.add(make_request())
    assert refused[1].finish_reason == "error"
    engine.abort(b"", waiting[0].request_id)
    assert engine.stats().waiting == 1
    assert engine.add(make_request()) == []
    run_to_end(engine)


def test_with_one_tenant_and_one_priority_fair_is_first_come_first_served() -> None:
    """Step for step: the same requests, the same tokens, the same blocks."""
    runs = []
    for policy, tenant in (("fcfs", ""), ("fair", ""), ("fair", "one")):
        executor = FakeExecutor(num_blocks=20, max_inflight=2)
        engine = make_engine(
            executor, max_num_batched_tokens=14, max_prefill_tokens_while_decoding=6, max_num_seqs=4, policy=policy
        )
        collector = Collector()
        for number, length in zip(itertools.count(), [3, 30, 9, 17, 2, 24, 11, 40, 5, 8] * 2, strict=False):
            sampling = tokens(3 + number % 12, n=1 + number % 3)
            prompt = range(number % 4, number % 4 + length)
            engine.add(make_request(prompt, request_id=f"r{number}", sampling=sampling, tenant=tenant))
            steps(engine, collector, number % 3)
        run_to_end(engine, collector)
        assert engine.stats().preemptions > 0
        blocks = [{new.key: new.block_ids for new in step.new_requests} for step in executor.steps]
        runs.append(([step.num_scheduled_tokens for step in executor.steps], blocks, collector.tokens))
    assert runs[0] == runs[1] == runs[2]
