"""Drafts in the schedule: what is verified, what is asked for, and that nothing of it shows in what a request gets."""

from __future__ import annotations

import pytest

from penstock.core.types import SampleStart, SamplingParams
from penstock.engine.executor import SpeculationProfile
from penstock.engine.step import RequestKey
from penstock.testing.builders import Collector, make_engine, make_request, run_to_end
from penstock.testing.fake_executor import FakeExecutor
from penstock.testing.fake_model import expected_tokens, oracle

VOCAB = 997


def drafting(
    num_drafts: int, num_right: int, *, max_inflight: int = 1, num_blocks: int = 64, num_host_blocks: int = 0
) -> FakeExecutor:
    """An executor that proposes `num_drafts` tokens, of which the first `num_right` are right."""
    return FakeExecutor(
        speculation=SpeculationProfile(num_drafts),
        propose=oracle(num_right, VOCAB),
        vocab_size=VOCAB,
        max_inflight=max_inflight,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
    )


def tokens_wanted(max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0, n=n)


def draft_lengths(executor: FakeExecutor, key: RequestKey) -> list[int]:
    """How many drafts were verified in each step of a request."""
    return [len(step.draft_token_ids.get(key, [])) for step in executor.steps if key in step.num_scheduled_tokens]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_right", [0, 1, 4])
def test_output_is_the_same_however_good_the_drafts_are(depth: int, num_right: int) -> None:
    executor = drafting(4, num_right, max_inflight=depth)
    engine = make_engine(executor)
    requests = [make_request(range(i, 2 * i + 3), sampling=tokens_wanted(3 + 3 * i)) for i in range(1, 8)]
    for request in requests:
        engine.add(request)
    done = run_to_end(engine)
    for request in requests:
        assert done.tokens[request.request_id, 0] == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)
    stats = engine.stats()
    assert stats.kv_blocks_used == 0
    assert stats.verifications > 0
    assert (stats.accepted_draft_tokens > 0) == (num_right > 0)
    assert stats.generation_tokens == sum(len(tokens) for tokens in done.tokens.values())


def test_right_drafts_save_steps() -> None:
    executor = drafting(4, 4)
    engine = make_engine(executor)
    engine.add(make_request(request_id="a", sampling=tokens_wanted(21)))
    run_to_end(engine)
    # The prompt's step gives one token, each verification five.
    assert draft_lengths(executor, "a/0") == [0, 4, 4, 4, 4]
    stats = engine.stats()
    assert (stats.verifications, stats.draft_tokens, stats.accepted_draft_tokens) == (4, 16, 16)


def test_a_request_is_set_back_by_the_drafts_that_were_refused() -> None:
    executor = drafting(5, 2)
    engine = make_engine(executor)
    engine.add(make_request(range(1, 8), request_id="a", sampling=tokens_wanted(30)))
    engine.step()
    for num_tokens in (11, 14, 17):
        engine.step()
        request = engine.scheduler.requests["a/0"]
        # Two drafts were right, then comes what was sampled instead of the third.
        assert request.num_tokens == num_tokens
        assert request.num_computed_tokens == request.num_retired_tokens == num_tokens - 1
        assert executor.steps[-1].num_scheduled_tokens == {"a/0": 6}
        (continued,) = executor.steps[-1].cached_requests
        assert continued.num_computed_tokens == num_tokens - 4


def test_the_last_tokens_of_an_output_are_not_overshot() -> None:
    executor = drafting(8, 8)
    engine = make_engine(executor)
    request = make_request(request_id="a", sampling=tokens_wanted(6))
    engine.add(request)
    done = run_to_end(engine)
    assert len(done.tokens["a", 0]) == 6
    assert draft_lengths(executor, "a/0") == [0, 4], "five tokens were left, the last of which needs no draft"
    assert executor.steps[-1].num_proposals == {}


def test_a_short_budget_serves_every_request_before_any_draft() -> None:
    executor = drafting(4, 4)
    engine = make_engine(executor, max_num_batched_tokens=5)
    for name in ("a", "b", "c"):
        engine.add(make_request([1, 2, 3], request_id=name, sampling=tokens_wanted(12)))
    run_to_end(engine)
    together = [step for step in executor.steps if step.num_scheduled_tokens.keys() == {"a/0", "b/0", "c/0"}]
    assert together
    for step in together:
        assert step.total_tokens <= 5
        counts = list(step.num_scheduled_tokens.values())
        assert counts == sorted(counts), "who only decodes comes first"
    assert any(sum(map(len, step.draft_token_ids.values())) == 2 for step in together)


def test_decodes_with_drafts_come_before_prompts_and_are_not_under_their_cap() -> None:
    executor = drafting(4, 4)
    engine = make_engine(executor, max_num_batched_tokens=16, max_prefill_tokens_while_decoding=2)
    engine.add(make_request(request_id="a", sampling=tokens_wanted(40)))
    engine.step()
    engine.add(make_request(range(30), request_id="b", sampling=tokens_wanted(1)))
    run_to_end(engine)
    mixed = [s.num_scheduled_tokens for s in executor.steps if {"a/0", "b/0"} <= s.num_scheduled_tokens.keys()]
    assert list(mixed[0].items()) == [("a/0", 5), ("b/0", 2)]


def test_guesses_preempt_nobody() -> None:
    # While b's prompt is computed piece by piece, all blocks but one are promised to it or held.
    executor = drafting(6, 0, num_blocks=7)
    engine = make_engine(executor, max_num_batched_tokens=16, max_prefill_tokens_while_decoding=2)
    engine.add(make_request([1, 2, 3, 4], request_id="a", sampling=tokens_wanted(20)))
    engine.step()
    engine.add(make_request(range(16), request_id="b", sampling=tokens_wanted(1)))
    run_to_end(engine)
    assert engine.stats().preemptions == 0
    lengths = draft_lengths(executor, "a/0")
    assert max(lengths) == 6
    assert 0 < min(length for length in lengths if length) < 6, "there were fewer where blocks were short"


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("num_host_blocks", [0, 32])
def test_preempted_requests_lose_their_drafts_and_nothing_else(depth: int, num_host_blocks: int) -> None:
    executor = drafting(3, 2, num_blocks=14, num_host_blocks=num_host_blocks, max_inflight=depth)
    engine = make_engine(executor)
    requests = [make_request(range(i, i + 10), sampling=tokens_wanted(20)) for i in range(6)]
    for request in requests:
        engine.add(request)
    done = run_to_end(engine)
    assert engine.stats().preemptions > 0
    assert engine.stats().verifications > 0
    for request in requests:
        assert done.tokens[request.request_id, 0] == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)


def test_a_stop_token_inside_a_right_run_ends_the_request_there() -> None:
    prompt = list(range(1, 10))
    wanted = expected_tokens(prompt, tokens_wanted(12), VOCAB)
    executor = drafting(8, 8)
    engine = make_engine(executor)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, seed=0, stop_token_ids=(wanted[5],))
    engine.add(make_request(prompt, request_id="a", sampling=sampling))
    final = run_to_end(engine).final["a", 0]
    assert (final.finish_reason, final.stop_token_id) == ("stop", wanted[5])
    assert final.offset + len(final.token_ids) == 6
    assert draft_lengths(executor, "a/0") == [0, 4], "nothing is sampled behind a stop token, so it is not verified"
    # The blocks of what came before the end can be found again, and hold what they are named for.
    again = make_request([*prompt, *wanted[:6], 7], sampling=tokens_wanted(3))
    engine.add(again)
    done = run_to_end(engine)
    assert done.first[again.request_id, 0].num_cached_tokens == 12
    assert done.tokens[again.request_id, 0] == expected_tokens(again.prompt_token_ids, again.sampling, VOCAB)


def test_refused_drafts_are_in_no_named_block() -> None:
    executor = drafting(7, 1)
    engine = make_engine(executor)
    first = make_request(range(1, 6), sampling=tokens_wanted(20))
    engine.add(first)
    output = run_to_end(engine).tokens[first.request_id, 0]
    for length in range(1, 20):
        request = make_request([*range(1, 6), *output[:length]], sampling=tokens_wanted(2))
        engine.add(request)
        done = run_to_end(engine)
        assert done.first[request.request_id, 0].num_cached_tokens == (5 + length - 1) // 4 * 4


def test_samples_of_one_request_have_drafts_of_their_own() -> None:
    executor = drafting(3, 2)
    engine = make_engine(executor, prefix_caching=False)
    request = make_request(range(1, 12), sampling=tokens_wanted(9, n=4))
    engine.add(request)
    done = run_to_end(engine)
    for index in range(4):
        expected = expected_tokens(request.prompt_token_ids, request.sampling, VOCAB, index)
        assert done.tokens[request.request_id, index] == expected
        assert max(draft_lengths(executor, f"{request.request_id}/{index}")) == 3


def test_a_resumed_output_goes_on_with_drafts() -> None:
    prompt, sampling = list(range(1, 10)), tokens_wanted(12)
    expected = expected_tokens(prompt, sampling, VOCAB)
    engine = make_engine(drafting(4, 4))
    request = make_request(prompt, sampling=sampling, samples=[SampleStart(0, expected[:5])], attempt=1)
    engine.add(request)
    assert run_to_end(engine).tokens[request.request_id, 0] == expected[5:]
    assert engine.stats().steps == 3


@pytest.mark.parametrize("depth", [1, 4])
def test_a_failed_verification_costs_nobody_the_answer(depth: int) -> None:
    failures = iter([MemoryError("once")])
    executor = FakeExecutor(
        max_inflight=depth,
        speculation=SpeculationProfile(3),
        fail_when=lambda step: next(failures, None) if step.draft_token_ids else None,
    )
    engine = make_engine(executor)
    requests = [make_request(range(i, i + 9), sampling=tokens_wanted(12)) for i in range(4)]
    for request in requests:
        engine.add(request)
    done = run_to_end(engine)
    assert engine.stats().step_failures == 1
    for request in requests:
        assert done.tokens[request.request_id, 0] == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)


def test_abort_while_drafts_are_verified() -> None:
    engine = make_engine(drafting(4, 2, max_inflight=2))
    request = make_request(sampling=tokens_wanted(100))
    engine.add(request)
    collector = Collector()
    for _ in range(3):
        collector.take(engine.step())
    collector.take(engine.abort(b"", request.request_id))
    run_to_end(engine, collector)
    tokens = collector.tokens[request.request_id, 0]
    assert tokens == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)[: len(tokens)]
    assert engine.stats().kv_blocks_used == 0
