"""Engines over several ranks beside the same engine in one process."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.core.config import EngineConfig
from penstock.core.types import EngineStats, LiveLimits, SamplingParams, TokenLogprobs
from penstock.engine.engine import Addressed, Engine
from penstock.engine.executor import Executor
from penstock.execution.models.config import ModelConfig
from penstock.execution.runner.executors import UniProcessExecutor
from penstock.execution.runner.parallel_executor import ParallelExecutor
from penstock.execution.runner.rank_group import RankGroup
from penstock.testing.builders import Collector, make_request, run_to_end
from penstock.testing.exactness import DEFAULT_MARGIN, DEFAULT_MAX_EXCUSED_SHARE, compare_greedy, mismatch_report

VOCAB = 272
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, seed=0, logprobs=2)
SEEDED = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=24, ignore_eos=True, seed=5, presence_penalty=0.4)
# A little more than the longest request, so that requests are preempted.
NUM_BLOCKS = 14


@dataclass(frozen=True)
class Run:
    """What one engine made of the prompts: tokens of the greedy ones with their log-probabilities and the distance to the next best, tokens
    of the others, and its counters."""

    greedy: list[list[int]]
    logprobs: list[list[float]]
    margins: list[list[float]]
    seeded: list[list[int]]
    stats: EngineStats


def settings(folder: Path, **changes: Any) -> EngineConfig:
    """A small budget and a small cache: prompts come in chunks and requests are preempted. The cache has NUM_BLOCKS blocks however many
    ranks share it."""
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        dtype="float32",
        threads=1,
        max_num_batched_tokens=40,
        max_num_seqs=6,
        max_prefill_tokens_while_decoding=16,
    )
    model = ModelConfig.from_folder(folder)
    config = dataclasses.replace(config, **changes)
    wide = {"auto": 4, "int8": 1}[config.kv_cache_dtype]
    block = 2 * 16 * model.num_layers * model.num_kv_heads * (model.head_dim * wide + (4 if wide == 1 else 0))
    return dataclasses.replace(config, kv_cache_gib=(NUM_BLOCKS + 0.5) * block / 2**30)


def prompts() -> list[list[int]]:
    """Of 3 to 90 tokens; half of them share a beginning."""
    rng = random.Random(3)
    base = [rng.randrange(VOCAB - 16) for _ in range(60)]
    lengths = (3, 17, 28, 20, 25, 60, 31, 16)
    return [
        base[: length // 2 * (index % 2)] + [rng.randrange(VOCAB - 16) for _ in range(length)]
        for index, length in enumerate(lengths)
    ]


class _Collector(Collector):
    """Keeps log-probabilities as well, where they were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: dict[str, list[TokenLogprobs]] = {}

    def take(self, deltas: Iterable[Addressed]) -> None:
        deltas = list(deltas)
        super().take(deltas)
        for _, delta in deltas:
            self.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs or [])


def run(executor: Executor, config: EngineConfig) -> Run:
    """All prompts, greedily and with a seed, in one go."""
    limits = LiveLimits(
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_prefill_tokens_while_decoding=config.max_prefill_tokens_while_decoding,
    )
    engine = Engine(executor, limits)
    work: Mapping[str, tuple[Sequence[int], SamplingParams]] = {
        f"{name}-{index}": (prompt, sampling)
        for index, prompt in enumerate(prompts())
        for name, sampling in (("greedy", GREEDY), ("seeded", SEEDED))
    }
    for request_id, (prompt, sampling) in work.items():
        engine.add(make_request(prompt, request_id=request_id, sampling=sampling))
    collector = _Collector()
    run_to_end(engine, collector)
    samples = {
        name: [collector.tokens[f"{name}-{index}", 0] for index in range(len(prompts()))]
        for name in ("greedy", "seeded")
    }
    entries = [collector.logprobs[f"greedy-{index}"] for index in range(len(prompts()))]
    return Run(
        greedy=samples["greedy"],
        logprobs=[[entry.logprob for entry in each] for each in entries],
        margins=[[entry.top[0][1] - entry.top[1][1] for entry in each] for each in entries],
        seeded=samples["seeded"],
        stats=engine.stats(),
    )


@contextmanager
def parallel(
    group: RankGroup, folder: Path, tensor: int, stages: int, *, draft_layers: int = 0, **changes: Any
) -> Iterator[ParallelExecutor]:
    """An executor over the first ranks of a group that lives on. draft_layers: of the draft model, whose blocks lie in the same cache."""
    config = settings(folder, tensor_parallel_size=tensor, pipeline_parallel_size=stages, **changes)
    model = ModelConfig.from_folder(folder)
    # All ranks have even shares. Heads that several ranks hold take room in each; the draft model is whole on every rank of the last stage,
    # which has its share of the layers and of the heads.
    room = max(1.0, tensor / model.num_kv_heads)
    room += draft_layers * tensor * stages / model.num_layers
    config = dataclasses.replace(config, kv_cache_gib=config.kv_cache_gib * room)
    executor = ParallelExecutor(config, folder, group=RankGroup(group.ranks[: tensor * stages]))
    try:
        yield executor
    finally:
        executor.shutdown()


def reference(folder: Path, **changes: Any) -> Run:
    """One process, one rank."""
    executor = UniProcessExecutor(settings(folder, **changes), folder)
    try:
        return run(executor, executor.config)
    finally:
        executor.shutdown()


def assert_equal(ours: Run, expected: Run, *, exact: bool, bound: float | None = None) -> None:
    """By the one rule of exactness. `exact`: the arithmetic is the same, so that random samples are too. `bound`: log-probabilities may
    differ by so much, because each rank rounds its share with scales of its own."""
    assert ours.stats.preemptions > 0
    assert ours.stats.prefix_hit_tokens > 0
    assert ours.stats.kv_blocks_total == expected.stats.kv_blocks_total == NUM_BLOCKS
    assert ours.stats.kv_blocks_used == 0
    if exact:
        assert ours.greedy == expected.greedy
        assert ours.seeded == expected.seeded
        return
    margin = DEFAULT_MARGIN if bound is None else 2 * bound
    comparisons = [
        compare_greedy(tokens, wanted, margins, margin=margin)
        for tokens, wanted, margins in zip(ours.greedy, expected.greedy, expected.margins, strict=True)
    ]
    report = mismatch_report(comparisons, max_excused_share=DEFAULT_MAX_EXCUSED_SHARE if bound is None else 1.0)
    assert report is None, report
    if bound is not None:
        assert sum(comparison.num_equal for comparison in comparisons) > len(comparisons)
        distance = _largest_distance(ours, expected, [comparison.num_equal for comparison in comparisons])
        assert distance <= bound
        return
    # Random samples part where a number falls between two sums of almost the same probabilities, which is rare.
    parted = sum(tokens != wanted for tokens, wanted in zip(ours.seeded, expected.seeded, strict=True))
    assert parted <= 1


def _largest_distance(ours: Run, expected: Run, num_equal: Sequence[int]) -> float:
    """Of the log-probabilities of equal tokens behind equal texts."""
    pairs = zip(ours.logprobs, expected.logprobs, num_equal, strict=True)
    return max(abs(a - b) for one, other, count in pairs for a, b in zip(one[:count], other[:count], strict=True))
