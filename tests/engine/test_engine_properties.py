"""Random sequences of adds, aborts, steps, failures and limit changes, with drafts of any quality, grammars and pipelines: blocks stay
whole, no request is lost, none is answered twice, and each gets its own tokens."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from penstock.core.types import EngineRequest, LiveLimits, SamplingParams
from penstock.engine.executor import SpeculationProfile
from penstock.engine.grammar import Matcher
from penstock.engine.speculation import SpeculationController
from penstock.engine.step import NewRequest, RequestKey
from penstock.testing.builders import Collector, make_engine, make_request
from penstock.testing.fake_executor import FakeExecutor
from penstock.testing.fake_model import expected_tokens, oracle
from penstock.testing.pattern_matcher import PatternMatcher, scattered_pattern

VOCAB = 61  # small, so that random prompts share prefixes and end-of-sequence turns up
PATTERN = scattered_pattern(VOCAB)


def pattern_of(request_id: str) -> Matcher | None:
    """Requests with a grammar have it in their name."""
    return PatternMatcher(PATTERN, VOCAB) if request_id.startswith("grammar") else None


def fickle_drafts(request: NewRequest, token_ids: list[int], count: int) -> list[int]:
    """None, some or all of the drafts that are wanted, of which none, some or all are right."""
    chance = zlib.crc32(array("q", token_ids).tobytes(), 1)
    propose = oracle(chance % (count + 2), VOCAB, pattern_of)
    return propose(request, token_ids, chance // 8 % (count + 2))[:count]


class FickleController(SpeculationController):
    """Wants drafts of some requests, sometimes of none."""

    def plan(self, keys: Sequence[RequestKey], num_others: int) -> list[int]:
        most = self.profile.max_draft_tokens + 1
        self.rounds = getattr(self, "rounds", 0) + 1
        return [zlib.crc32(key.encode(), self.rounds) % most if self.rounds % 4 else 0 for key in keys]


class EngineMachine(RuleBasedStateMachine):
    depth = 1
    micro_batches = 1
    requests = Bundle("requests")

    @initialize(
        num_blocks=st.integers(12, 30),
        num_host_blocks=st.sampled_from([0, 3, 16]),
        policy=st.sampled_from(["fcfs", "priority", "fair", "fair"]),
        prefix_caching=st.booleans(),
        budget=st.integers(3, 24),
        prefill_cap=st.integers(1, 24),
        max_num_seqs=st.integers(1, 6),
        max_drafts=st.sampled_from([0, 1, 3, 6]),
        controller=st.sampled_from([SpeculationController, FickleController]),
    )
    def start(
        self,
        num_blocks: int,
        num_host_blocks: int,
        policy: str,
        prefix_caching: bool,
        budget: int,
        prefill_cap: int,
        max_num_seqs: int,
        max_drafts: int,
        controller: type[SpeculationController],
    ) -> None:
        self.fail_next = False
        self.now = 0.0
        self.ceiling = (budget, max_num_seqs)
        self.executor = FakeExecutor(
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            max_inflight=self.depth,
            vocab_size=VOCAB,
            micro_batches=self.micro_batches,
            speculation=SpeculationProfile(max_drafts) if max_drafts else None,
            propose=fickle_drafts,
            fail_when=lambda step: self.failure(),
        )
        with mock.patch("penstock.engine.engine.SpeculationController", controller):
            self.engine = make_engine(
                self.executor,
                max_num_batched_tokens=budget,
                max_prefill_tokens_while_decoding=prefill_cap,
                max_num_seqs=max_num_seqs,
                policy=policy,
                prefix_caching=prefix_caching,
                clock=lambda: self.now,
                matcher_for=lambda request: pattern_of(request.request_id),
            )
        self.collector = Collector()
        self.added: dict[str, EngineRequest] = {}
        self.aborted: set[str] = set()
        self.failures = 0

    def failure(self) -> Exception | None:
        if self.fail_next:
            self.fail_next = False
            self.failures += 1
            return RuntimeError("injected")
        return None

    @rule(
        target=requests,
        prefix=st.integers(0, 3),
        length=st.integers(1, 30),
        max_tokens=st.integers(0, 16),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        seed=st.integers(0, 2),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        timeout_s=st.sampled_from([None, None, 5.0]),
        queue_timeout_s=st.sampled_from([None, None, 2.0]),
        tenant=st.sampled_from(["a", "b", "c"]),
        weight=st.sampled_from([0.5, 1.0, 8.0]),
        grammar=st.sampled_from([False, False, True]),
    )
    def add(
        self,
        prefix: int,
        length: int,
        max_tokens: int,
        n: int,
        priority: int,
        seed: int,
        prompt_logprobs: int | None,
        timeout_s: float | None,
        queue_timeout_s: float | None,
        tenant: str,
        weight: float,
        grammar: bool,
    ) -> str:
        prompt = [(prefix + i * i) % VOCAB for i in range(length)]
        sampling = SamplingParams(max_tokens=max_tokens, n=n, seed=seed, prompt_logprobs=prompt_logprobs)
        request = make_request(
            prompt,
            request_id=f"{'grammar' if grammar else 'plain'}{len(self.added)}",
            sampling=sampling,
            priority=priority,
            timeout_s=timeout_s,
            queue_timeout_s=queue_timeout_s,
            tenant=tenant,
            weight=weight,
        )
        self.added[request.request_id] = request
        self.collector.take(self.engine.add(request))
        return request.request_id

    @rule(request_id=consumes(requests), only_first=st.booleans())
    def abort(self, request_id: str, only_first: bool) -> None:
        self.aborted.add(request_id)
        self.collector.take(self.engine.abort(b"", request_id, [0] if only_first else None))

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.collector.take(self.engine.step())
            self.engine.check_integrity()

    @rule()
    def next_step_fails(self) -> None:
        self.fail_next = True

    @rule(share=st.integers(1, 4))
    def change_limits(self, share: int) -> None:
        budget, seqs = self.ceiling
        self.engine.configure(
            LiveLimits(max_num_batched_tokens=max(1, budget // share), max_num_seqs=max(1, seqs // share))
        )

    @rule(seconds=st.floats(0.5, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.collector.take(self.engine.expire())

    @invariant()
    def blocks_are_whole(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work():
                break
            self.collector.take(self.engine.step())
        assert not self.engine.has_work(), "the engine does not come to rest"
        self.engine.check_integrity()
        assert self.engine.stats().kv_blocks_used == 0
        for request_id, request in self.added.items():
            for index in range(request.sampling.n):
                self.check_outcome(request, (request_id, index))

    def check_outcome(self, request: EngineRequest, sample: tuple[str, int]) -> None:
        final = self.collector.final[sample]
        tokens = self.collector.tokens[sample]
        matcher = pattern_of(request.request_id)
        expected = expected_tokens(request.prompt_token_ids, request.sampling, VOCAB, sample[1], matcher)
        if final.finish_reason in ("stop", "length"):
            assert tokens == expected
        elif final.finish_reason == "abort":
            assert request.request_id in self.aborted
            assert tokens == expected[: len(tokens)]
        else:
            assert final.error is not None
            refused = final.error.status == 400 and not tokens
            late = final.error.status == 504 and request.timeout_s is not None
            waited = final.error.status == 503 and request.queue_timeout_s is not None and not tokens
            failed = final.error.status == 500 and self.failures > 0
            assert refused or late or waited or failed, final


def run(depth: int, micro_batches: int, max_examples: int) -> None:
    name = f"EngineMachineDepth{depth}Parts{micro_batches}"
    run_state_machine_as_test(
        type(name, (EngineMachine,), {"depth": depth, "micro_batches": micro_batches}),
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(("depth", "micro_batches"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3)])
def test_random_sequences(depth: int, micro_batches: int) -> None:
    run(depth, micro_batches, max_examples=50)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "micro_batches"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (3, 3)])
def test_long_random_sequences(depth: int, micro_batches: int) -> None:
    run(depth, micro_batches, max_examples=300)
