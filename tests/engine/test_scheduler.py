"""The scheduling rule, driven through the engine with a fake executor that checks every block, at in-flight depth 1, 2 and 4."""

from __future__ import annotations

import pytest

from penstock.core.errors import InvalidRequestError
from penstock.core.types import LiveLimits, SampleStart, SamplingParams
from penstock.testing.builders import Collector, make_engine, make_request, run_to_end
from penstock.testing.fake_executor import FakeExecutor
from penstock.testing.fake_model import expected_tokens

VOCAB = 997


@pytest.fixture(params=[1, 2, 4])
def depth(request: pytest.FixtureRequest) -> int:
    value = request.param
    assert isinstance(value, int)
    return value


def greedy(max_tokens: int = 8, **kwargs: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0, n=kwargs.get("n", 1))


def test_every_request_gets_the_tokens_of_its_solo_run(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth))
    requests = [make_request(range(i, 2 * i + 3), sampling=greedy(3 + i)) for i in range(1, 12)]
    for request in requests:
        assert engine.add(request) == []
    done = run_to_end(engine)
    for request in requests:
        assert done.tokens[request.request_id, 0] == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)
        assert done.final[request.request_id, 0].finish_reason == "length"
    assert engine.stats().kv_blocks_used == 0


def test_prompts_are_chunked_to_the_budget_and_decodes_come_first(depth: int) -> None:
    executor = FakeExecutor(max_inflight=depth)
    engine = make_engine(executor, max_num_batched_tokens=10, max_prefill_tokens_while_decoding=6)
    short = make_request(range(3), request_id="short", sampling=greedy(20))
    engine.add(short)
    collector = Collector()
    while not collector.tokens.get(("short", 0)):
        collector.take(engine.step())
    long = make_request(range(30), request_id="long", sampling=greedy(2))
    engine.add(long)
    run_to_end(engine, collector)
    mixed = [s.num_scheduled_tokens for s in executor.steps if len(s.num_scheduled_tokens) == 2]
    assert mixed, "prompt and decode ran in one batch"
    for step in mixed:
        assert next(iter(step.items())) == ("short/0", 1)
        assert step["long/0"] <= 6, "the cap on prefill while others decode"
    assert all(s.total_tokens <= 10 for s in executor.steps)
    assert sum(s.num_scheduled_tokens.get("long/0", 0) for s in executor.steps) >= 31


def test_max_num_seqs_bounds_the_batch(depth: int) -> None:
    executor = FakeExecutor(max_inflight=depth)
    engine = make_engine(executor, max_num_seqs=3)
    for _ in range(9):
        engine.add(make_request(sampling=greedy(4)))
    run_to_end(engine)
    assert max(len(s.num_scheduled_tokens) for s in executor.steps) == 3


def test_preempted_requests_are_recomputed_and_lose_nothing(depth: int) -> None:
    executor = FakeExecutor(num_blocks=14, max_inflight=depth)
    engine = make_engine(executor, prefix_caching=False)
    requests = [make_request(range(i, i + 10), sampling=greedy(20)) for i in range(6)]
    for request in requests:
        engine.add(request)
    done = run_to_end(engine)
    assert engine.stats().preemptions > 0
    for request in requests:
        assert done.tokens[request.request_id, 0] == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)


def test_first_come_first_served_finishes_the_oldest_first(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth), max_num_seqs=1)
    for name in ("a", "b", "c"):
        engine.add(make_request(request_id=name))
    done = run_to_end(engine)
    assert [request_id for request_id, _ in done.final] == ["a", "b", "c"]


def test_priority_overtakes_and_displaces(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth), max_num_seqs=1, policy="priority")
    engine.add(make_request(request_id="background", priority=5, sampling=greedy(30)))
    engine.add(make_request(request_id="later", priority=5))
    collector = Collector()
    for _ in range(6):
        collector.take(engine.step())
    engine.add(make_request(request_id="urgent", priority=-1))
    run_to_end(engine, collector)
    assert [request_id for request_id, _ in collector.final] == ["urgent", "background", "later"]
    assert len(collector.tokens["background", 0]) == 30


def test_prefix_hits_skip_computation_and_are_reported(depth: int) -> None:
    executor = FakeExecutor(max_inflight=depth)
    engine = make_engine(executor)
    first = make_request(range(1, 18))
    engine.add(first)
    run_to_end(engine)
    second = make_request([*range(1, 18), 99])
    engine.add(second)
    done = run_to_end(engine)
    assert done.first[second.request_id, 0].num_cached_tokens == 16
    assert done.tokens[second.request_id, 0] == expected_tokens(second.prompt_token_ids, second.sampling, VOCAB)
    new = next(n for s in executor.steps for n in s.new_requests if n.key == f"{second.request_id}/0")
    assert new.num_computed_tokens == 16


def test_a_full_hit_computes_at_least_one_token(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth))
    prompt = range(1, 17)
    for expected_hit in (0, 12):
        request = make_request(prompt)
        engine.add(request)
        done = run_to_end(engine)
        assert done.first[request.request_id, 0].num_cached_tokens == expected_hit


def test_salts_separate_prefixes(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth))
    for salt, hit in (("a", 0), ("b", 0), ("a", 16)):
        request = make_request(range(1, 18), cache_salt=salt)
        engine.add(request)
        assert run_to_end(engine).first[request.request_id, 0].num_cached_tokens == hit


def test_without_prefix_caching_nothing_is_found_again(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth), prefix_caching=False)
    for _ in range(2):
        request = make_request(range(1, 18))
        engine.add(request)
        assert run_to_end(engine).first[request.request_id, 0].num_cached_tokens == 0


def test_evicted_blocks_return_from_the_host(depth: int) -> None:
    executor = FakeExecutor(num_blocks=8, num_host_blocks=32, max_inflight=depth)
    engine = make_engine(executor)
    prompts = [[10 * i + j for j in range(20)] for i in range(4)]
    for _ in range(3):
        for prompt in prompts:
            request = make_request(prompt, sampling=greedy(4))
            engine.add(request)
            done = run_to_end(engine)
            assert done.tokens[request.request_id, 0] == expected_tokens(prompt, request.sampling, VOCAB)
    stats = engine.stats()
    assert stats.swapped_out_blocks > 0
    assert stats.swapped_in_blocks > 0
    assert stats.prefix_hit_tokens > 0


def test_samples_share_the_prompt_and_copy_on_write(depth: int) -> None:
    executor = FakeExecutor(max_inflight=depth)
    engine = make_engine(executor, prefix_caching=False)
    request = make_request(range(1, 12), sampling=greedy(6, n=4))
    engine.add(request)
    done = run_to_end(engine)
    for index in range(4):
        expected = expected_tokens(request.prompt_token_ids, request.sampling, VOCAB, index)
        assert done.tokens[request.request_id, index] == expected
    copies = [move for step in executor.steps for move in step.block_copies]
    assert len(copies) == 3, "one copy of the prompt's partial block for each further sample"
    new = [n for step in executor.steps for n in step.new_requests]
    assert len({tuple(n.block_ids[:2]) for n in new}) == 1, "full blocks of the prompt are shared"
    prompt_tokens = sum(s.total_tokens for s in executor.steps) - 4 * 5
    assert prompt_tokens <= 11 + 3 + 4 * (depth - 1), "the prompt is computed once, its last token once per sample"


def test_samples_survive_the_abort_of_their_leader(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth), max_num_batched_tokens=4)
    request = make_request(range(1, 20), sampling=greedy(5, n=3))
    engine.add(request)
    collector = Collector()
    collector.take(engine.step())
    collector.take(engine.abort(b"", request.request_id, [0]))
    run_to_end(engine, collector)
    assert collector.final[request.request_id, 0].finish_reason == "abort"
    for index in (1, 2):
        expected = expected_tokens(request.prompt_token_ids, request.sampling, VOCAB, index)
        assert collector.tokens[request.request_id, index] == expected


def test_abort_frees_blocks_when_the_steps_in_flight_have_retired(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth))
    request = make_request(sampling=greedy(100))
    engine.add(request)
    for _ in range(5):
        engine.step()
    (delta,) = engine.abort(b"", request.request_id)
    assert delta[1].finish_reason == "abort"
    assert (engine.stats().kv_blocks_used > 0) == (depth > 1)
    assert run_to_end(engine).final == {}
    assert engine.stats().kv_blocks_used == 0
    assert engine.abort(b"", request.request_id) == [], "unknown ids are ignored"


def test_resumed_output_continues_where_it_was(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth))
    prompt, sampling = list(range(1, 10)), greedy(12)
    expected = expected_tokens(prompt, sampling, VOCAB)
    request = make_request(prompt, sampling=sampling, samples=[SampleStart(0, expected[:5])], attempt=1)
    engine.add(request)
    done = run_to_end(engine)
    assert done.first[request.request_id, 0].offset == 5
    assert done.first[request.request_id, 0].attempt == 1
    assert done.tokens[request.request_id, 0] == expected[5:]


def test_stop_tokens_end_a_request_and_min_tokens_delays_it(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth))
    prompt = list(range(1, 10))
    tokens = expected_tokens(prompt, greedy(8), VOCAB)
    stopping = SamplingParams(max_tokens=8, ignore_eos=True, seed=0, stop_token_ids=(tokens[3],))
    request = make_request(prompt, sampling=stopping)
    engine.add(request)
    final = run_to_end(engine).final[request.request_id, 0]
    assert (final.finish_reason, final.stop_token_id) == ("stop", tokens[3])
    assert final.offset + len(final.token_ids) == 4


def test_max_tokens_zero_returns_prompt_logprobs_only(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth), max_num_batched_tokens=4)
    prompt = list(range(1, 12))
    request = make_request(prompt, sampling=SamplingParams(max_tokens=0, prompt_logprobs=1, seed=0))
    engine.add(request)
    done = run_to_end(engine)
    final = done.final[request.request_id, 0]
    assert final.finish_reason == "length"
    assert done.tokens[request.request_id, 0] == []
    assert final.prompt_logprobs is not None
    assert final.prompt_logprobs[0] is None
    assert [entry.token_id for entry in final.prompt_logprobs[1:] if entry] == prompt[1:]
    assert [entry.logprob for entry in final.prompt_logprobs[1:] if entry] == [-float(p) for p in range(1, 11)]


def test_prompt_logprobs_ignore_prefix_hits_and_survive_preemption(depth: int) -> None:
    executor = FakeExecutor(num_blocks=10, max_inflight=depth)
    engine = make_engine(executor, max_num_batched_tokens=6)
    prompt = list(range(1, 18))
    engine.add(make_request(prompt))
    run_to_end(engine)
    engine.add(make_request(range(50, 60), sampling=greedy(16)))
    request = make_request(prompt, sampling=SamplingParams(max_tokens=6, prompt_logprobs=0, seed=0, ignore_eos=True))
    engine.add(request)
    done = run_to_end(engine)
    first = done.first[request.request_id, 0]
    assert first.num_cached_tokens == 0
    assert first.prompt_logprobs is not None
    assert [entry.token_id for entry in first.prompt_logprobs[1:] if entry] == prompt[1:]


def test_limits_change_while_running(depth: int) -> None:
    executor = FakeExecutor(max_inflight=depth)
    engine = make_engine(executor, max_num_batched_tokens=16, max_num_seqs=4)
    for _ in range(8):
        engine.add(make_request(range(1, 20), sampling=greedy(10)))
    engine.step()
    seen = len(executor.steps)
    assert engine.configure(LiveLimits(max_num_batched_tokens=5, max_num_seqs=2)).max_num_seqs == 2
    run_to_end(engine)
    assert all(step.total_tokens <= 5 for step in executor.steps[seen:])
    with pytest.raises(InvalidRequestError, match="max_num_seqs must be between 1 and its start-up value 4, not 5"):
        engine.configure(LiveLimits(max_num_seqs=5))
    with pytest.raises(InvalidRequestError, match="max_num_batched_tokens"):
        engine.configure(LiveLimits(max_num_batched_tokens=0))
    assert engine.stats().limits.max_num_batched_tokens == 5


def test_a_request_that_fails_alone_does_not_end_another(depth: int) -> None:
    engine = make_engine(FakeExecutor(max_inflight=depth, error_when=lambda k: "NaN" if k == "bad/0" else None))
    good = make_request(request_id="good")
    engine.add(good)
    engine.add(make_request(request_id="bad"))
    done = run_to_end(engine)
    error = done.final["bad", 0].error
    assert error is not None
    assert error.status == 500
    assert "NaN" not in error.message, "internals stay in the log"
    assert done.tokens["good", 0] == expected_tokens(good.prompt_token_ids, good.sampling, VOCAB)


def test_a_poisonous_request_is_isolated_from_its_batch(depth: int) -> None:
    executor = FakeExecutor(
        max_inflight=depth,
        fail_when=lambda step: RuntimeError("boom") if "bad/0" in step.num_scheduled_tokens else None,
    )
    engine = make_engine(executor)
    good = [make_request(range(i, i + 7)) for i in range(5)]
    for request in good[:3]:
        engine.add(request)
    engine.add(make_request(request_id="bad"))
    for request in good[3:]:
        engine.add(request)
    done = run_to_end(engine)
    assert done.final["bad", 0].finish_reason == "error"
    for request in good:
        assert done.tokens[request.request_id, 0] == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)
    assert engine.stats().step_failures >= 2


def test_a_step_that_fails_once_costs_nobody_the_answer(depth: int) -> None:
    failures = iter([None, None, None, MemoryError("once")])
    executor = FakeExecutor(max_inflight=depth, num_host_blocks=16, fail_when=lambda step: next(failures, None))
    engine = make_engine(executor)
    requests = [make_request(range(i, i + 9), sampling=greedy(12)) for i in range(4)]
    for request in requests:
        engine.add(request)
    done = run_to_end(engine)
    for request in requests:
        assert done.tokens[request.request_id, 0] == expected_tokens(request.prompt_token_ids, request.sampling, VOCAB)


def test_lengths_that_do_not_fit_are_refused_with_both_numbers(depth: int) -> None:
    engine = make_engine(FakeExecutor(num_blocks=8, block_size=4, max_model_len=256, max_inflight=depth))
    ((_, delta),) = engine.add(make_request(range(30), sampling=greedy(3)))
    assert delta.error is not None
    assert delta.error.code == "context_length_exceeded"
    assert "256" in delta.error.message
    assert "32" in delta.error.message
    request = make_request(range(30), sampling=greedy(2))
    assert engine.add(request) == []
    assert len(run_to_end(engine).tokens[request.request_id, 0]) == 2


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([997], "outside"), ([-1], "outside")])
def test_prompts_that_would_break_the_model_are_refused(prompt: list[int], message: str) -> None:
    ((_, delta),) = make_engine().add(make_request(prompt))
    assert delta.error is not None
    assert delta.error.status == 400
    assert message in delta.error.message


def test_the_waiting_queue_is_bounded() -> None:
    engine = make_engine(max_waiting_requests=2)
    outcomes = [engine.add(make_request()) for _ in range(3)]
    ((_, delta),) = outcomes[2]
    assert delta.error is not None
    assert delta.error.status == 503
    assert outcomes[:2] == [[], []]


def test_deadlines_end_requests_with_504() -> None:
    now = [100.0]
    engine = make_engine(clock=lambda: now[0])
    late = make_request(timeout_s=5.0, sampling=greedy(100))
    engine.add(late)
    other = make_request()
    engine.add(other)
    collector = Collector()
    collector.take(engine.step())
    now[0] += 4.9
    assert engine.expire() == []
    now[0] += 0.2
    collector.take(engine.expire())
    run_to_end(engine, collector)
    error = collector.final[late.request_id, 0].error
    assert error is not None
    assert error.status == 504
    assert collector.final[other.request_id, 0].finish_reason == "length"
