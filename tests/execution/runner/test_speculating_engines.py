"""Engines that speculate say what an engine says that does not: token for token, for all kinds of requests, whoever proposes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import pytest

from penstock.core.types import EngineRequest, EngineStats, LiveLimits, SamplingParams, TokenLogprobs
from penstock.engine.engine import Engine
from penstock.engine.executor import KVCapacity, SpeculationProfile
from penstock.execution.models.registry import LoadedModel
from penstock.execution.speculative.oracle import OracleProposer, recorded_answers
from penstock.execution.speculative.proposer import Proposer
from penstock.testing.builders import Collector, make_request
from tests.execution.runner.harness import BLOCK_SIZE, Harness
from tests.execution.runner.proposers import draft_model, ngrams
from tests.execution.runner.test_overlapping_steps import (
    MAX_SLOTS,
    NUM_BLOCKS,
    NUM_HOST_BLOCKS,
    Outcome,
    Outcomes,
    RunnerExecutor,
    assert_equal,
    fail,
    random_requests,
)

MakeProposer = Callable[[Harness], Proposer]
SEED = 2
LIMITS = LiveLimits(max_num_batched_tokens=32, max_num_seqs=6, max_prefill_tokens_while_decoding=9)


@dataclass(frozen=True)
class Run:
    """What clients were told, and what the engine says of itself."""

    outcomes: Outcomes
    stats: EngineStats


class SizedExecutor(RunnerExecutor):
    """A runner with `num_blocks` blocks as an executor, one step after the other."""

    def __init__(self, harness: Harness, num_blocks: int) -> None:
        super().__init__(harness, 1)
        self._num_blocks = num_blocks

    def kv_capacity(self) -> KVCapacity:
        return KVCapacity(self._num_blocks, BLOCK_SIZE, 1, NUM_HOST_BLOCKS)


def run(
    loaded: LoadedModel,
    requests: list[EngineRequest],
    make_proposer: MakeProposer | None = None,
    *,
    num_drafts: int = 3,
    num_blocks: int = NUM_BLOCKS,
    arrival: float = 0.4,
) -> Run:
    """Answer `requests`, which arrive while others run."""
    harness = Harness(
        loaded, num_blocks=num_blocks, num_host_blocks=NUM_HOST_BLOCKS, max_slots=MAX_SLOTS, make_proposer=make_proposer
    )
    harness.model.hook = fail
    executor = SizedExecutor(harness, num_blocks)
    executor.speculation = None if make_proposer is None else SpeculationProfile(num_drafts)
    engine = Engine(executor, LIMITS)
    rng, waiting, collector = random.Random(SEED), list(requests), Collector()
    logprobs: dict[tuple[str, int], list[TokenLogprobs]] = {}
    while waiting or engine.has_work():
        if waiting and rng.random() < arrival:
            collector.take(engine.add(waiting.pop(0)))
        deltas = engine.step()
        collector.take(deltas)
        for _, delta in deltas:
            logprobs.setdefault((delta.request_id, delta.index), []).extend(delta.logprobs or [])
        engine.check_integrity()
    return Run(
        {
            sample: Outcome(
                tokens,
                collector.final[sample].finish_reason,
                logprobs[sample],
                collector.first[sample].prompt_logprobs or [],
            )
            for sample, tokens in collector.tokens.items()
        },
        engine.stats(),
    )


def every_kind() -> list[EngineRequest]:
    """Shared prefixes and samples, all kinds of sampling, and some requests that make the model fail. A third may say few different tokens,
    so that they repeat themselves."""
    requests = []
    for number, request in enumerate(random_requests(random.Random(SEED))):
        sampling = msgspec.structs.replace(request.sampling, max_tokens=2 * (request.sampling.max_tokens or 1))
        if number % 3 == 0:
            sampling = msgspec.structs.replace(sampling, allowed_token_ids=(10, 11, 12), stop_token_ids=())
        requests.append(msgspec.structs.replace(request, request_id=f"every-kind-{number}", sampling=sampling))
    return requests


@pytest.fixture(scope="module")
def plain(loaded: LoadedModel) -> Run:
    """What is said without drafts."""
    return run(loaded, every_kind())


def oracle(plain: Run, acceptance: float, stand_in: MakeProposer | None = None) -> MakeProposer:
    """Foresees the first sample of each request."""
    answers = {
        tuple(request.prompt_token_ids): plain.outcomes[request.request_id, 0].tokens for request in every_kind()
    }

    def make(harness: Harness) -> Proposer:
        return OracleProposer(
            harness.batch,
            recorded_answers(answers),
            acceptance=acceptance,
            vocab_size=harness.loaded.config.vocab_size,
            stand_in=None if stand_in is None else stand_in(harness),
        )

    return make


def _without_last_words(one: Outcomes, other: Outcomes) -> tuple[Outcomes, Outcomes]:
    """Cut what failing requests have said to the same length: a draft may be the token that makes the model fail, a step earlier."""
    one, other = dict(one), dict(other)
    for sample in one:
        if one[sample].reason == "error" == other[sample].reason:
            length = min(len(one[sample].tokens), len(other[sample].tokens))
            for outcomes in (one, other):
                cut = outcomes[sample]
                outcomes[sample] = replace(cut, tokens=cut.tokens[:length], logprobs=cut.logprobs[:length])
    return one, other


@pytest.mark.parametrize("proposer", ["n-grams", "draft model", "the model itself", "oracle"])
def test_an_engine_that_speculates(loaded: LoadedModel, draft: LoadedModel, plain: Run, proposer: str) -> None:
    make: dict[str, MakeProposer] = {
        "n-grams": ngrams,
        "draft model": draft_model(draft, max_tokens=24),
        "the model itself": draft_model(loaded),
        "oracle": oracle(plain, 0.7, draft_model(draft)),
    }
    found = run(loaded, every_kind(), make[proposer])
    stats = found.stats
    assert min(stats.preemptions, stats.swapped_out_blocks, stats.swapped_in_blocks, stats.prefix_hit_tokens) > 0
    assert {outcome.reason for outcome in found.outcomes.values()} == {"stop", "length", "error"}
    assert stats.draft_tokens > 10
    assert stats.accepted_draft_tokens > 0
    assert_equal(*_without_last_words(found.outcomes, plain.outcomes))


def simple_requests() -> list[EngineRequest]:
    """Requests whose tokens depend on nothing but the distribution: no penalties, no forbidden tokens."""
    requests = []
    for number in range(12):
        start = (1, 60, 120)[number % 3]
        sampling = SamplingParams(
            max_tokens=12 + number % 5, seed=number, temperature=(0.0, 0.9)[number % 2], top_p=0.95, ignore_eos=True
        )
        prompt = range(start, start + 13 + 3 * number)
        requests.append(make_request(prompt, request_id=f"r{number}", sampling=sampling))
    return requests


@pytest.mark.parametrize("num_blocks", [28, 120])
def test_the_model_itself_is_always_right(loaded: LoadedModel, num_blocks: int) -> None:
    """Equal distributions propose exactly what is sampled, so that a single refused draft would be a key or value that is not right:
    after chunked prefills, prefix hits, preemptions and blocks that come back from the host."""
    found = run(loaded, simple_requests(), draft_model(loaded, max_tokens=40), num_blocks=num_blocks)
    assert found.outcomes == run(loaded, simple_requests(), num_blocks=num_blocks).outcomes
    stats = found.stats
    assert stats.draft_tokens > 50
    assert stats.accepted_draft_tokens == stats.draft_tokens
    assert stats.prefix_hit_tokens > 0
    if num_blocks < 100:
        assert min(stats.preemptions, stats.swapped_in_blocks) > 0
