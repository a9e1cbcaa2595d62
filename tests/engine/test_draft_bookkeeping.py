"""What is counted and measured of drafts, when steps with drafts overlap, and what is made of a proposer or runner that does not help."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from unittest import mock

import pytest

from penstock.core.errors import IntegrityError
from penstock.core.types import SamplingParams
from penstock.engine.engine import Engine
from penstock.engine.executor import SpeculationProfile, StepHandle
from penstock.engine.speculation import SpeculationController
from penstock.engine.step import RequestKey, RunnerOutput, SchedulerOutput
from penstock.testing.builders import make_engine, make_request, run_to_end
from penstock.testing.fake_executor import FakeExecutor
from penstock.testing.fake_model import Propose, oracle

VOCAB = 997


def tokens_wanted(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0)


class _WatchedExecutor(FakeExecutor):
    """Notes how many steps were in flight when one was submitted."""

    def __init__(self, max_drafts: int) -> None:
        super().__init__(max_inflight=2, speculation=SpeculationProfile(max_drafts))
        self.num_inflight: list[int] = []

    def submit(self, step: SchedulerOutput) -> StepHandle:
        self.num_inflight.append(len(self._queue))
        return super().submit(step)


class RecordingController(SpeculationController):
    """Keeps what it is told; wants `wanted` drafts of everybody."""

    def __init__(self, profile: SpeculationProfile) -> None:
        super().__init__(profile)
        self.wanted = profile.max_draft_tokens
        self.asked: list[tuple[int, int]] = []
        self.results: list[tuple[RequestKey, int, int]] = []
        self.steps: list[tuple[int, int, float]] = []
        self.ended: list[RequestKey] = []

    def plan(self, keys: Sequence[RequestKey], num_others: int) -> list[int]:
        self.asked.append((len(keys), num_others))
        return [self.wanted] * len(keys)

    def verified(self, key: RequestKey, num_drafts: int, num_accepted: int) -> None:
        self.results.append((key, num_drafts, num_accepted))

    def step_done(self, num_requests: int, num_prompt_tokens: int, seconds: float, draft_seconds: float) -> None:
        self.steps.append((num_requests, num_prompt_tokens, seconds))

    def forget(self, key: RequestKey) -> None:
        self.ended.append(key)


def with_recording(
    executor: FakeExecutor, clock: Callable[[], float] = time.monotonic
) -> tuple[Engine, RecordingController]:
    assert executor.speculation is not None
    controller = RecordingController(executor.speculation)
    with mock.patch("penstock.engine.engine.SpeculationController", return_value=controller):
        return make_engine(executor, clock=clock), controller


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_steps_overlap_only_without_drafts(num_drafts: int) -> None:
    executor = _WatchedExecutor(2)
    engine, controller = with_recording(executor)
    controller.wanted = num_drafts
    for i in range(3):
        engine.add(make_request(range(i, i + 5), sampling=tokens_wanted(10)))
    run_to_end(engine)
    # With drafts the requests stay together: none runs while others wait for what a step in flight verifies.
    assert max(executor.num_inflight) == (1 if num_drafts == 0 else 0)
    assert max(len(step.num_scheduled_tokens) for step in executor.steps) == 3


def test_the_controller_is_told_what_was_verified_and_what_steps_took() -> None:
    executor = FakeExecutor(speculation=SpeculationProfile(3), propose=oracle(1, VOCAB))
    engine, controller = with_recording(executor)
    engine.add(make_request(request_id="a", sampling=tokens_wanted(9)))
    engine.add(make_request(request_id="b", sampling=tokens_wanted(2)))
    run_to_end(engine)
    stats = engine.stats()
    # Towards the end fewer are asked for: all of those before might be right.
    assert controller.results == [("a/0", num_drafts, 1) for num_drafts in (3, 3, 2, 1)]
    assert stats.verifications == len(controller.results) == 4
    assert stats.draft_tokens == sum(drafts for _, drafts, _ in controller.results) == 9
    assert stats.accepted_draft_tokens == sum(accepted for _, _, accepted in controller.results) == 4
    assert sorted(controller.ended) == ["a/0", "b/0"]
    # b gets its second and last token beside a's first drafts, and is in no step after that one.
    assert controller.asked[:2] == [(1, 1), (1, 0)]
    prompts = executor.steps[0].total_tokens - 2
    assert [steps[:2] for steps in controller.steps] == [(2, prompts), (2, 0), (1, 0), (1, 0), (1, 0)]


class _SlowHandle:
    """A result that takes a second to come."""

    def __init__(self, handle: StepHandle, clock: list[float]) -> None:
        self._handle = handle
        self._clock = clock

    def done(self) -> bool:
        return self._handle.done()

    def result(self) -> RunnerOutput:
        self._clock[0] += 1.0
        return self._handle.result()


class _SlowExecutor(FakeExecutor):
    def __init__(self, clock: list[float], max_inflight: int) -> None:
        super().__init__(max_inflight=max_inflight, speculation=SpeculationProfile(2))
        self._clock = clock

    def submit(self, step: SchedulerOutput) -> StepHandle:
        return _SlowHandle(super().submit(step), self._clock)


@pytest.mark.parametrize(("depth", "num_drafts"), [(1, 2), (2, 2), (2, 0)])
def test_a_step_takes_what_no_earlier_step_took(depth: int, num_drafts: int) -> None:
    clock = [50.0]
    engine, controller = with_recording(_SlowExecutor(clock, depth), clock=lambda: clock[0])
    controller.wanted = num_drafts
    engine.add(make_request(sampling=tokens_wanted(8)))
    run_to_end(engine)
    assert len(controller.steps) > 1
    assert {seconds for _, _, seconds in controller.steps} == {1.0}


def test_a_proposer_without_an_idea_leaves_plain_decoding() -> None:
    nothing: Propose = lambda request, token_ids, count: []  # noqa: E731
    executor = FakeExecutor(speculation=SpeculationProfile(3), propose=nothing)
    engine, controller = with_recording(executor)
    engine.add(make_request(request_id="a", sampling=tokens_wanted(6)))
    run_to_end(engine)
    assert all(step.num_scheduled_tokens["a/0"] == 1 for step in executor.steps[1:])
    assert [asked for asked, _ in controller.asked] == [1] * 4, "of the last two tokens none was asked for"
    assert engine.stats().verifications == 0


class _ForgingHandle:
    """A result that says other tokens than those of the drafts were accepted."""

    def __init__(self, handle: StepHandle, step: SchedulerOutput) -> None:
        self._handle = handle
        self._step = step

    def done(self) -> bool:
        return self._handle.done()

    def result(self) -> RunnerOutput:
        output = self._handle.result()
        for key, drafts in self._step.draft_token_ids.items():
            output.sampled_token_ids[key] = [drafts[0] + 1, 5]
        return output


class _ForgingExecutor(FakeExecutor):
    def submit(self, step: SchedulerOutput) -> StepHandle:
        return _ForgingHandle(super().submit(step), step)


def test_a_runner_that_accepts_what_was_not_drafted_is_not_trusted() -> None:
    engine = make_engine(_ForgingExecutor(speculation=SpeculationProfile(2)))
    engine.add(make_request())
    engine.step()
    with pytest.raises(IntegrityError, match="verified"):
        engine.step()
