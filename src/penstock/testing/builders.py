"""Short ways to build engines and requests in tests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

from penstock.core.types import EngineRequest, LiveLimits, SampleStart, SamplingParams, TokenDelta
from penstock.engine.engine import Addressed, Engine
from penstock.engine.grammar import Matcher
from penstock.testing.fake_executor import FakeExecutor

_ids = itertools.count()


def make_request(
    prompt: Iterable[int] = range(1, 9),
    *,
    request_id: str | None = None,
    sampling: SamplingParams | None = None,
    samples: list[SampleStart] | None = None,
    priority: int = 0,
    tenant: str = "",
    weight: float = 1.0,
    cache_salt: str = "",
    timeout_s: float | None = None,
    queue_timeout_s: float | None = None,
    attempt: int = 0,
) -> EngineRequest:
    """A greedy request for 8 tokens of any kind, unless told otherwise."""
    return EngineRequest(
        request_id=f"r{next(_ids)}" if request_id is None else request_id,
        attempt=attempt,
        prompt_token_ids=list(prompt),
        sampling=sampling or SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0),
        samples=samples or [],
        priority=priority,
        tenant=tenant,
        weight=weight,
        cache_salt=cache_salt,
        timeout_s=timeout_s,
        queue_timeout_s=queue_timeout_s,
    )


def make_engine(
    executor: FakeExecutor | None = None,
    *,
    max_num_batched_tokens: int = 32,
    max_num_seqs: int = 8,
    max_prefill_tokens_while_decoding: int = 32,
    policy: str = "fair",
    prefix_caching: bool = True,
    max_waiting_requests: int = 1024,
    clock: Callable[[], float] = time.monotonic,
    matcher_for: Callable[[EngineRequest], Matcher | None] | None = None,
) -> Engine:
    """An engine over a fake executor."""
    limits = LiveLimits(
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_prefill_tokens_while_decoding=max_prefill_tokens_while_decoding,
    )
    executor = executor or FakeExecutor()
    return Engine(
        executor,
        limits,
        policy=policy,
        prefix_caching=prefix_caching,
        max_waiting_requests=max_waiting_requests,
        clock=clock,
        matcher_for=matcher_for,
    )


class Collector:
    """Gathers deltas per sample and checks that they are consecutive and that each sample ends once."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.final: dict[tuple[str, int], TokenDelta] = {}
        self.first: dict[tuple[str, int], TokenDelta] = {}

    def take(self, deltas: Iterable[Addressed]) -> None:
        for _, delta in deltas:
            sample = (delta.request_id, delta.index)
            if sample in self.final:
                raise AssertionError(f"{sample} was answered after its end: {delta}")
            start = self.first.setdefault(sample, delta).offset
            tokens = self.tokens.setdefault(sample, [])
            if delta.offset != start + len(tokens):
                raise AssertionError(f"{sample} has {len(tokens)} tokens, its next delta starts at {delta.offset}")
            tokens.extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.final[sample] = delta


def run_to_end(engine: Engine, collector: Collector | None = None, *, max_steps: int = 10_000) -> Collector:
    """Step until nothing is left to do, checking integrity after every step."""
    collector = collector or Collector()
    for _ in range(max_steps):
        if not engine.has_work():
            engine.check_integrity()
            return collector
        collector.take(engine.step())
        engine.check_integrity()
    raise AssertionError(f"still busy after {max_steps} steps: {engine.scheduler.requests}")
