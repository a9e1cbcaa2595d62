"""Requests divided over the steps of a pipeline: parts of equal size, nobody in two steps at once, nobody left behind."""

from __future__ import annotations

import pytest

from penstock.core.types import SampleStart, SamplingParams
from penstock.engine.executor import SpeculationProfile, StepHandle
from penstock.engine.micro_batches import MicroBatches
from penstock.engine.request import Request
from penstock.engine.step import SchedulerOutput
from penstock.testing.builders import Collector, make_engine, make_request, run_to_end
from penstock.testing.fake_executor import FakeExecutor
from penstock.testing.fake_model import expected_tokens, oracle

VOCAB = 997


def tokens_wanted(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0)


def sizes(executor: FakeExecutor) -> list[int]:
    return [len(step.num_scheduled_tokens) for step in executor.steps]


@pytest.mark.parametrize(
    ("num_requests", "stages", "parts"), [(8, 2, {4}), (5, 2, {2, 3}), (7, 3, {2, 3}), (2, 4, {1}), (1, 2, {1})]
)
def test_in_steady_state_every_stage_has_its_part(num_requests: int, stages: int, parts: set[int]) -> None:
    executor = FakeExecutor(micro_batches=stages, max_inflight=stages)
    engine = make_engine(executor)
    requests = [make_request(range(i, i + 4), sampling=tokens_wanted(12)) for i in range(num_requests)]
    for request in requests:
        engine.add(request)
    done = run_to_end(engine)
    steady = sizes(executor)[stages : -2 * stages]
    assert set(steady) == parts
    used_stages = min(stages, num_requests)
    assert sum(steady[:used_stages]) == num_requests
    for request in requests:
        assert done.tokens[request.request_id, 0] == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)


def test_prompts_that_come_together_are_divided_too() -> None:
    executor = FakeExecutor(micro_batches=2, max_inflight=2)
    engine = make_engine(executor)
    for i in range(6):
        engine.add(make_request([i, 1, 2], sampling=tokens_wanted(3)))
    engine.step()
    assert [sorted(step.num_scheduled_tokens.values()) for step in executor.steps] == [[3, 3, 3], [3, 3, 3]]


class _CountingExecutor(FakeExecutor):
    """Notes how many steps are in flight with each that is submitted."""

    def __init__(self, *, micro_batches: int, max_inflight: int) -> None:
        super().__init__(micro_batches=micro_batches, max_inflight=max_inflight)
        self.num_inflight: list[int] = []

    def submit(self, step: SchedulerOutput) -> StepHandle:
        handle = super().submit(step)
        self.num_inflight.append(len(self._queue))
        return handle


def test_there_are_as_many_parts_as_stages_however_many_steps_an_executor_takes() -> None:
    executor = _CountingExecutor(micro_batches=2, max_inflight=4)
    engine = make_engine(executor)
    # Two of the first part end early; what the other part has more than its share does not become a third one.
    for i in range(8):
        engine.add(make_request([i, 1, 2], sampling=tokens_wanted(4 if i < 2 else 30)))
    run_to_end(engine)
    assert max(executor.num_inflight) == 2
    assert set(sizes(executor)[12:50]) == {3}


def test_parts_are_made_even_again_when_requests_end() -> None:
    executor = FakeExecutor(micro_batches=2, max_inflight=2)
    engine = make_engine(executor)
    # The first part ends early.
    for i in range(8):
        engine.add(make_request([i, 1, 2], sampling=tokens_wanted(4 if i < 4 else 30)))
    run_to_end(engine)
    assert sizes(executor)[:6] == [4] * 6
    assert set(sizes(executor)[8:-2]) == {2}


def test_a_long_prompt_is_in_one_step_at_a_time_and_keeps_its_promise() -> None:
    executor = FakeExecutor(micro_batches=2, max_inflight=3, num_blocks=12)
    engine = make_engine(executor, max_num_batched_tokens=6)
    long = make_request(range(30), request_id="long", sampling=tokens_wanted(2))
    engine.add(long)
    collector = Collector()
    collector.take(engine.step())
    engine.add(make_request(range(50, 60), request_id="other", sampling=tokens_wanted(6)))
    run_to_end(engine, collector)
    assert engine.stats().preemptions == 0
    assert collector.tokens["long", 0] == expected_tokens(long.prompt_token_ids, long.sampling, VOCAB)


@pytest.mark.parametrize("num_right", [0, 2])
@pytest.mark.parametrize("num_blocks", [14, 20])
def test_drafts_in_a_pipeline_change_nothing(num_right: int, num_blocks: int) -> None:
    executor = FakeExecutor(
        micro_batches=2,
        max_inflight=2,
        speculation=SpeculationProfile(3),
        propose=oracle(num_right, VOCAB),
        num_blocks=num_blocks,
    )
    engine = make_engine(executor, max_num_batched_tokens=16)
    requests = [make_request(range(i, i + 3 + 5 * (i % 2)), sampling=tokens_wanted(24)) for i in range(6)]
    for request in requests:
        engine.add(request)
    done = run_to_end(engine)
    stats = engine.stats()
    # Some lose their blocks while their drafts are verified.
    assert stats.preemptions > 0
    assert stats.draft_tokens > stats.accepted_draft_tokens
    for request in requests:
        assert done.tokens[request.request_id, 0] == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)


def test_an_urgent_request_displaces_somebody_though_all_parts_are_full() -> None:
    executor = FakeExecutor(micro_batches=2, max_inflight=2)
    engine = make_engine(executor, max_num_seqs=4, policy="priority")
    for i in range(4):
        engine.add(make_request([i, 1, 2], priority=5, sampling=tokens_wanted(40)))
    for _ in range(6):
        engine.step()
    engine.add(make_request(request_id="urgent", priority=-1, sampling=tokens_wanted(4)))
    assert next(iter(run_to_end(engine).final)) == ("urgent", 0)


def waiting_request(last_step_id: int, *, in_flight: bool) -> Request:
    request = Request(
        make_request(),
        SampleStart(0),
        client=b"",
        order=0,
        now=0.0,
        eos_token_ids=(),
        max_output_tokens=8,
        root_hash=b"",
    )
    request.last_step_id = last_step_id
    request.num_inflight = int(in_flight)
    return request


def test_those_that_waited_longest_are_next() -> None:
    flying = [waiting_request(9, in_flight=True)]
    free = [waiting_request(step_id, in_flight=False) for step_id in (8, 7, 8, 6)]
    assert MicroBatches(2, 1).next_decodes([*flying, *free]) == [free[3], free[1], free[0]]
    assert MicroBatches(2, 0).next_decodes(free) == [free[3], free[1]]
    assert MicroBatches(1, 0).next_decodes(free) == free
    assert MicroBatches(2, 1).next_decodes(flying) == []


def test_new_requests_join_the_smallest_part() -> None:
    running = [waiting_request(9, in_flight=i < 4) for i in range(7)]
    # Four are in flight, three are free: an eighth makes both parts equal, and a ninth is for the step after.
    assert MicroBatches(2, 1).share(running, 1) == 4
    assert MicroBatches(2, 1).share(running, 2) == 5
    assert MicroBatches(3, 2).share(running[:1]) == 0
