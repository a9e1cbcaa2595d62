"""Requests whose output is restricted: one mask for each token that is sampled, and a matcher that has seen exactly what is known."""

from __future__ import annotations

import pytest

from penstock.core.errors import InvalidRequestError
from penstock.core.types import EngineRequest, SampleStart, SamplingParams
from penstock.engine.executor import SpeculationProfile, StepHandle
from penstock.engine.grammar import Matcher, masks_along
from penstock.engine.step import RunnerOutput, SchedulerOutput
from penstock.testing.builders import make_engine, make_request, run_to_end
from penstock.testing.fake_executor import FakeExecutor
from penstock.testing.fake_model import expected_tokens, oracle
from penstock.testing.pattern_matcher import PatternMatcher, allowed_tokens, scattered_pattern

VOCAB = 61
PATTERN = scattered_pattern(VOCAB)
# a, then b or c, then the end.
CHAIN = {0: {10: 1}, 1: {11: 2, 12: 2}, 2: {0: 3}, 3: {}}


class Matchers:
    """Makes matchers for requests whose name begins with "g", and keeps them."""

    def __init__(self, transitions: dict[int, dict[int, int]] = PATTERN) -> None:
        self.transitions = transitions
        self.made: list[PatternMatcher] = []

    def __call__(self, request: EngineRequest) -> Matcher | None:
        if not request.request_id.startswith("g"):
            return None
        self.made.append(PatternMatcher(self.transitions, VOCAB))
        return self.made[-1]


def fresh(key: str) -> Matcher | None:
    return PatternMatcher(PATTERN, VOCAB) if key.startswith("g") else None


def sampling(max_tokens: int = 14, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=3, n=n)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("num_drafts", "num_right"), [(0, 0), (4, 0), (4, 2), (4, 4)])
def test_restricted_and_free_requests_together(depth: int, num_drafts: int, num_right: int) -> None:
    executor = FakeExecutor(
        vocab_size=VOCAB,
        max_inflight=depth,
        num_blocks=24,
        speculation=SpeculationProfile(num_drafts) if num_drafts else None,
        propose=oracle(num_right, VOCAB, fresh),
    )
    matchers = Matchers()
    engine = make_engine(executor, matcher_for=matchers, max_num_batched_tokens=12)
    requests = [
        make_request(range(i, 2 * i + 4), request_id=f"{'g' if i % 2 else 'free'}{i}", sampling=sampling(n=1 + i % 3))
        for i in range(8)
    ]
    for request in requests:
        engine.add(request)
    done = run_to_end(engine)
    for request in requests:
        for index in range(request.sampling.n):
            matcher = fresh(request.request_id)
            expected = expected_tokens(request.prompt_token_ids, request.sampling, VOCAB, index, matcher)
            assert done.tokens[request.request_id, index] == expected
    lengths = {len(masks) for step in executor.steps for masks in step.token_masks.values()}
    # The first wrong draft is one that the grammar refuses, so that it is not even verified.
    assert max(lengths) == 1 + min(num_right, num_drafts)
    restricted = [tokens for (name, _), tokens in done.tokens.items() if name.startswith("g")]
    assert sorted(matcher.num_accepted for matcher in matchers.made) == sorted(map(len, restricted))


def test_masks_follow_the_drafts_and_the_matcher_is_left_as_it_was() -> None:
    matcher = PatternMatcher({0: {1: 1}, 1: {2: 0, 3: 2}, 2: {4: 2}}, 8)
    assert matcher.accept(1)
    drafts, masks = masks_along(matcher, [3, 4, 4, 1, 4])
    assert drafts == [3, 4, 4]
    assert [allowed_tokens(mask) for mask in masks] == [[2, 3], [4], [4], [4]]
    assert matcher.num_accepted == 1
    assert allowed_tokens(matcher.mask()) == [2, 3]
    assert masks_along(matcher, []) == ([], [matcher.mask()])
    assert masks_along(matcher, [7, 3]) == ([], [matcher.mask()])


def test_a_draft_that_ends_the_output_is_not_verified() -> None:
    matcher = PatternMatcher(CHAIN, VOCAB)
    drafts, masks = masks_along(matcher, [10, 12, 0, 5])
    assert drafts == [10, 12]
    assert [allowed_tokens(mask) for mask in masks] == [[10], [11, 12], [0]]
    assert matcher.num_accepted == 0


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_of_the_grammar_ends_the_request(ignore_eos: bool) -> None:
    engine = make_engine(FakeExecutor(vocab_size=VOCAB), matcher_for=Matchers(CHAIN))
    engine.add(make_request(request_id="g", sampling=SamplingParams(max_tokens=9, seed=0, ignore_eos=ignore_eos)))
    final = run_to_end(engine).final["g", 0]
    assert final.finish_reason == "stop"
    assert final.stop_token_id == (None if ignore_eos else 0)
    assert final.offset + len(final.token_ids) == 3


def test_masks_come_with_the_step_that_samples() -> None:
    executor = FakeExecutor(vocab_size=VOCAB, max_inflight=2)
    engine = make_engine(executor, matcher_for=Matchers(), max_num_batched_tokens=4)
    engine.add(make_request(range(10), request_id="g", sampling=sampling(3)))
    run_to_end(engine)
    assert [len(step.token_masks) for step in executor.steps[:3]] == [0, 0, 1]
    assert [step.num_scheduled_tokens["g/0"] for step in executor.steps[:3]] == [4, 4, 2]


def test_a_preempted_request_goes_on_with_its_matcher() -> None:
    executor = FakeExecutor(
        vocab_size=VOCAB, num_blocks=10, speculation=SpeculationProfile(3), propose=oracle(2, VOCAB, fresh)
    )
    engine = make_engine(executor, matcher_for=Matchers(), prefix_caching=False)
    requests = [make_request(range(i, i + 9), request_id=f"g{i}", sampling=sampling(18)) for i in range(4)]
    for request in requests:
        engine.add(request)
    done = run_to_end(engine)
    assert engine.stats().preemptions > 0
    for request in requests:
        expected = expected_tokens(request.prompt_token_ids, request.sampling, VOCAB, 0, fresh("g"))
        assert done.tokens[request.request_id, 0] == expected


def test_a_resumed_output_is_taken_in_first() -> None:
    prompt = list(range(1, 10))
    expected = expected_tokens(prompt, sampling(), VOCAB, 0, fresh("g"))
    assert len(expected) > 5
    engine = make_engine(FakeExecutor(vocab_size=VOCAB), matcher_for=Matchers())
    engine.add(make_request(prompt, request_id="g", sampling=sampling(), samples=[SampleStart(0, expected[:4])]))
    assert run_to_end(engine).tokens["g", 0] == expected[4:]


def test_a_resumed_output_that_the_grammar_does_not_know_is_refused() -> None:
    engine = make_engine(FakeExecutor(vocab_size=VOCAB), matcher_for=Matchers(CHAIN))
    for output in ([10, 10], [10, 11, 0]):
        ((_, delta),) = engine.add(make_request(request_id="g", samples=[SampleStart(0, output)]))
        assert delta.error is not None
        assert delta.error.status == 400
        assert "grammar" in delta.error.message
    assert not engine.has_work()


def test_a_grammar_that_cannot_be_made_refuses_its_request_alone() -> None:
    def matcher_for(request: EngineRequest) -> Matcher | None:
        if request.request_id == "bad":
            raise InvalidRequestError("The grammar has no end.", param="response_format")
        return None

    engine = make_engine(FakeExecutor(vocab_size=VOCAB), matcher_for=matcher_for)
    good = make_request(sampling=sampling())
    engine.add(good)
    ((_, delta),) = engine.add(make_request(request_id="bad"))
    assert delta.error is not None
    assert (delta.error.status, delta.error.param) == (400, "response_format")
    done = run_to_end(engine)
    assert done.tokens[good.request_id, 0] == expected_tokens(good.prompt_token_ids, good.sampling, VOCAB)


class _DeafHandle:
    """The result of a sampler that does not look at masks."""

    def __init__(self, handle: StepHandle) -> None:
        self._handle = handle

    def done(self) -> bool:
        return self._handle.done()

    def result(self) -> RunnerOutput:
        output = self._handle.result()
        output.sampled_token_ids.update({key: [50] for key in output.sampled_token_ids if key.startswith("g")})
        return output


class _DeafExecutor(FakeExecutor):
    def submit(self, step: SchedulerOutput) -> StepHandle:
        return _DeafHandle(super().submit(step))


def test_a_token_that_is_not_allowed_ends_its_request_alone() -> None:
    engine = make_engine(_DeafExecutor(vocab_size=VOCAB), matcher_for=Matchers(CHAIN))
    engine.add(make_request(request_id="g", sampling=sampling()))
    good = make_request(sampling=sampling())
    engine.add(good)
    done = run_to_end(engine)
    final = done.final["g", 0]
    assert final.error is not None
    assert final.error.status == 500
    assert done.tokens["g", 0] == []
    assert done.tokens[good.request_id, 0] == expected_tokens(good.prompt_token_ids, good.sampling, VOCAB)
