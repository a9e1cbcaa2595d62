"""Engines over overlapping steps of a device say what an engine says whose steps run one after the other on the host."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from penstock.core.types import EngineRequest, LiveLimits, ModelInfo, SamplingParams, TokenLogprobs
from penstock.engine.engine import Engine
from penstock.engine.executor import KVCapacity, SpeculationProfile, StepHandle
from penstock.engine.step import RunnerOutput, SchedulerOutput
from penstock.execution.models.registry import LoadedModel
from penstock.execution.sampling.device_sampler import DeviceSampler
from penstock.execution.speculative.proposer import Proposer
from penstock.testing.builders import Collector, make_request
from tests.execution.runner.device_harness import DeviceHarness
from tests.execution.runner.harness import BLOCK_SIZE, MAX_MODEL_LEN, Harness
from tests.execution.runner.proposers import Turns, draft_model

# Tokens that make the model fail for the request alone, or for the whole step.
POISON, BOMB = 250, 251
NUM_BLOCKS, NUM_HOST_BLOCKS, MAX_SLOTS = 28, 40, 12
SEEDS = [0, 1]
MAX_DRAFTS = 3
SAMPLER_SEED = 3
NUM_REQUESTS, FEW_REQUESTS, ABORTED_NUMBER = 15, 3, 3
ABORTED = (f"r{ABORTED_NUMBER}", 0)


class RunnerExecutor:
    """A runner as an executor."""

    def __init__(self, harness: Harness, max_inflight: int) -> None:
        self.max_inflight = max_inflight
        self.micro_batches = 1
        self.speculation = None if harness.proposer is None else SpeculationProfile(MAX_DRAFTS)
        self.num_verified = 0
        self._harness = harness

    def submit(self, step: SchedulerOutput) -> StepHandle:
        self.num_verified += sum(len(drafts) for drafts in step.draft_token_ids.values())
        if isinstance(self._harness, DeviceHarness):
            return self._harness.device_runner.launch(step)
        return ExecutedStep(self._harness, step)

    def kv_capacity(self) -> KVCapacity:
        return KVCapacity(NUM_BLOCKS, BLOCK_SIZE, 1, NUM_HOST_BLOCKS)

    def model_info(self) -> ModelInfo:
        config = self._harness.loaded.config
        return ModelInfo(
            architecture="tiny",
            dtype="float32",
            device="cpu",
            vocab_size=config.vocab_size,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=config.eos_token_ids,
            num_parameters=0,
            weight_bytes=0,
            model_hash="tiny",
            block_size=BLOCK_SIZE,
            kv_cache_tokens=NUM_BLOCKS * BLOCK_SIZE,
        )

    def shutdown(self) -> None: ...


class ExecutedStep:
    def __init__(self, harness: Harness, step: SchedulerOutput) -> None:
        self._outcome: RunnerOutput | Exception
        try:
            self._outcome = harness.runner.execute(step)
        except RuntimeError as error:
            self._outcome = error

    def done(self) -> bool:
        return True

    def result(self) -> RunnerOutput:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


@dataclass
class Outcome:
    """What a client was told of a sample."""

    tokens: list[int]
    reason: str | None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)


Outcomes = dict[tuple[str, int], Outcome]


def random_requests(rng: random.Random) -> list[EngineRequest]:
    """Shared prefixes, samples that share a prompt, every kind of sampling, and some that make the model fail."""
    requests = []
    for number in range(NUM_REQUESTS):
        start = rng.choice([1, 50, 100, 150])
        prompt = [start + i for i in range(rng.randint(1, 45))]
        if number in (5, 6):
            prompt.append(POISON)
        if number == 11:
            prompt.append(BOMB)
        sampling = SamplingParams(
            max_tokens=14 if number == ABORTED_NUMBER else rng.randint(1, 14),
            n=rng.choice([1, 1, 1, 3]),
            seed=number,
            temperature=rng.choice([0.0, 0.8]),
            top_p=rng.choice([1.0, 0.9]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            min_tokens=rng.choice([0, 1]),
            stop_token_ids=() if number == ABORTED_NUMBER else tuple(rng.sample(range(256), 24)),
            ignore_eos=number == ABORTED_NUMBER,
            logprobs=rng.choice([None, 0, 3]),
            prompt_logprobs=rng.choice([None, None, 2]),
        )
        requests.append(make_request(prompt, request_id=f"r{number}", sampling=sampling))
    return requests


def fail(input_ids: Tensor, hidden: Tensor) -> Tensor:
    if (input_ids == BOMB).any():
        raise RuntimeError("injected")
    hidden[input_ids == POISON] = torch.nan
    return hidden


def outcomes(harness: Harness, depth: int, seed: int, count: int = NUM_REQUESTS) -> Outcomes:
    """Run `count` random requests, which arrive while others run, and abort one."""
    rng = random.Random(seed)
    harness.model.hook = fail
    limits = LiveLimits(max_num_batched_tokens=24, max_num_seqs=6, max_prefill_tokens_while_decoding=9)
    executor = RunnerExecutor(harness, depth)
    engine = Engine(executor, limits)
    waiting = random_requests(rng)[:count]
    # With drafts requests end sooner, and have to come sooner to be in each other's way.
    arrivals = 0.4 if harness.proposer is None else 0.9
    collector, logprobs = Collector(), dict[tuple[str, int], list[TokenLogprobs]]()
    while waiting or engine.has_work():
        if waiting and rng.random() < arrivals:
            collector.take(engine.add(waiting.pop(0)))
        deltas = engine.step()
        if len(collector.tokens.get(ABORTED, ())) > 2:
            deltas += engine.abort(b"", ABORTED[0], [ABORTED[1]])
        collector.take(deltas)
        for _, delta in deltas:
            logprobs.setdefault((delta.request_id, delta.index), []).extend(delta.logprobs or [])
        engine.check_integrity()
    stats = engine.stats()
    assert (executor.num_verified > count) == (harness.proposer is not None)
    if count == NUM_REQUESTS:
        assert min(stats.preemptions, stats.swapped_out_blocks, stats.swapped_in_blocks, stats.prefix_hit_tokens) > 0
    return {
        sample: Outcome(
            tokens,
            collector.final[sample].finish_reason,
            logprobs[sample],
            collector.first[sample].prompt_logprobs or [],
        )
        for sample, tokens in collector.tokens.items()
    }


def assert_equal(found: Outcomes, expected: Outcomes) -> None:
    assert found.keys() == expected.keys()
    for sample, outcome in found.items():
        other = expected[sample]
        if sample == ABORTED:
            assert outcome.reason == other.reason == "abort"
            length = min(len(outcome.tokens), len(other.tokens))
            assert outcome.tokens[:length] == other.tokens[:length]
            continue
        assert (outcome.reason, outcome.tokens) == (other.reason, other.tokens), sample
        assert_equal_logprobs([*outcome.logprobs], [*other.logprobs])
        assert_equal_logprobs(outcome.prompt_logprobs, other.prompt_logprobs)


def assert_equal_logprobs(found: list[TokenLogprobs | None], expected: list[TokenLogprobs | None]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.fixture(scope="module")
def expected_outcomes(loaded: LoadedModel) -> dict[int, Outcomes]:
    """What steps say that run one after the other on the host, by seed."""
    return {
        seed: outcomes(
            Harness(loaded, num_blocks=NUM_BLOCKS, num_host_blocks=NUM_HOST_BLOCKS, max_slots=MAX_SLOTS), 1, seed
        )
        for seed in SEEDS
    }


@pytest.mark.parametrize(("depth", "largest_graph", "seed"), [(1, 0, 0), (2, 0, 1), (2, 3, 0), (3, 6, 1)])
def test_an_engine_over_overlapping_steps(
    loaded: LoadedModel, expected_outcomes: dict[int, Outcomes], depth: int, largest_graph: int, seed: int
) -> None:
    harness = DeviceHarness(
        loaded,
        num_blocks=NUM_BLOCKS,
        num_host_blocks=NUM_HOST_BLOCKS,
        max_slots=MAX_SLOTS,
        max_inflight=depth,
        largest_graph=largest_graph,
    )
    found = outcomes(harness, depth, seed)
    assert {outcome.reason for outcome in found.values()} == {"stop", "length", "error", "abort"}
    assert (harness.graphs is not None and harness.graphs.runs > 5) == (largest_graph > 0)
    assert_equal(found, expected_outcomes[seed])


@pytest.mark.parametrize(
    ("depth", "largest_graph", "drafter", "seed"),
    [
        (2, 0, "itself", 0),
        (3, 6, "both", 1),
        pytest.param(1, 6, "itself", 1, marks=pytest.mark.slow),
        pytest.param(2, 6, "other", 0, marks=pytest.mark.slow),
    ],
)
def test_drafts_change_nothing(
    loaded: LoadedModel,
    draft: LoadedModel,
    expected_outcomes: dict[int, Outcomes],
    depth: int,
    largest_graph: int,
    drafter: str,
    seed: int,
) -> None:
    """Whoever drafts: the model itself, whose drafts are all right, another one, whose drafts are all wrong, or both by turns."""
    itself, other = draft_model(loaded), draft_model(draft)
    drafters: dict[str, Callable[[Harness], Proposer]] = {
        "itself": itself,
        "other": other,
        "both": lambda harness: Turns([itself(harness), other(harness)]),
    }
    harness = DeviceHarness(
        loaded,
        num_blocks=NUM_BLOCKS,
        num_host_blocks=NUM_HOST_BLOCKS,
        max_slots=MAX_SLOTS,
        max_inflight=depth,
        largest_graph=largest_graph,
        graph_lengths=(1, 2, 1 + MAX_DRAFTS),
        max_drafts=MAX_DRAFTS,
        make_proposer=drafters[drafter],
    )
    assert_equal(outcomes(harness, depth, seed), expected_outcomes[seed])
    assert harness.graphs is None or harness.graphs.lengths_run == {1, 2, 1 + MAX_DRAFTS}


@pytest.mark.parametrize("drafts", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_sampler_of_the_device(loaded: LoadedModel, drafts: bool) -> None:
    """A few requests, because its kernels are slow when they are interpreted."""
    host = Harness(loaded, num_blocks=NUM_BLOCKS, num_host_blocks=NUM_HOST_BLOCKS)
    count = FEW_REQUESTS - drafts
    expected = outcomes(host, 1, SAMPLER_SEED, count)
    assert any(outcome.logprobs for outcome in expected.values())
    harness = DeviceHarness(
        loaded,
        num_blocks=NUM_BLOCKS,
        num_host_blocks=NUM_HOST_BLOCKS,
        max_drafts=MAX_DRAFTS,
        make_proposer=draft_model(loaded) if drafts else None,
        sampler=DeviceSampler,
    )
    assert_equal(outcomes(harness, 2, SAMPLER_SEED, count), expected)
