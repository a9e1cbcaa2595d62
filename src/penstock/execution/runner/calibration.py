"""What decoding and drafting cost on this machine, by steps of requests made up for it before anybody is served.

All requests lie in the same few blocks, over a context that nobody computed: what a step takes does not depend on the values of keys and
values. What they leave behind is overwritten before it is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.config import EngineConfig
from penstock.core.types import SamplingParams
from penstock.engine.executor import StepHandle
from penstock.engine.step import CachedRequest, NewRequest, RunnerOutput, SchedulerOutput

# Enough for attention to count as it does in a short conversation.
_CONTEXT = 128
# Tokens that the steps of one size may add to a request, drafts included.
_ROOM = 32
# What all sizes together may take; a step that takes longer than the second is measured once, for want of time. Of several the fastest
# counts: what disturbs a measurement makes it longer.
_BUDGET_SECONDS = 1.6
_SLOW_SECONDS = 0.05
_REPEATS = 5
_DRAFT_REPEATS = 3
_PROPOSALS = 4
# Calls in which a draft model computes the context of the first request.
_MAX_CATCH_UP_CALLS = 8
_SAMPLING = SamplingParams(seed=0, temperature=0.0)

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Costs:
    """As in SpeculationProfile."""

    step_seconds: Curve = ()
    draft_seconds: Curve = ()
    first_draft_seconds: Curve = ()


def measure_costs(
    config: EngineConfig,
    submit: Callable[[SchedulerOutput], StepHandle],
    num_blocks: int,
    max_len: int,
    *,
    has_draft_model: bool,
) -> Costs:
    """Measure steps of 1, 2, 4 … tokens, and drafts for as many requests, up to twice --max-num-seqs or until the time is up. Contexts have
    at most `max_len` tokens and lie in the first of `num_blocks` blocks. Nothing where there is no room for that."""
    room = min(max_len, num_blocks * config.block_size)
    full_blocks = min(_CONTEXT, room - _ROOM - 1) // config.block_size
    if full_blocks < 1:
        return Costs()
    requests = _Requests(submit, config.block_size, full_blocks)
    begun = time.perf_counter()
    steps: list[tuple[int, float]] = []
    drafts: list[tuple[int, float]] = []
    firsts: list[tuple[int, float]] = []
    for size in _sizes(config):
        spent = time.perf_counter() - begun
        # A size takes about as long as all before it, at least where it takes long.
        if len(steps) > 1 and 2 * spent > _BUDGET_SECONDS:
            break
        count = min(size, config.max_num_seqs)
        requests.start(count)
        try:
            if has_draft_model and count == size:
                first, further = requests.draft_seconds(patient=not drafts)
                firsts.append((count, first))
                drafts.append((count, further))
            steps.append((size, requests.step_seconds(num_drafts=size // count - 1)))
        finally:
            requests.finish()
    return Costs(tuple(steps), tuple(drafts), tuple(firsts))


def _sizes(config: EngineConfig) -> list[int]:
    """Tokens of the steps, ascending: powers of two, all that run at once, and twice as many, each with a draft."""
    most = config.max_num_seqs
    sizes = [size for size in (2**power for power in range(16)) if size < most] + [most, 2 * most]
    return [size for size in sizes if size <= config.max_num_batched_tokens]


class _Requests:
    """Some requests that decode, all in the same blocks."""

    def __init__(self, submit: Callable[[SchedulerOutput], StepHandle], block_size: int, full_blocks: int) -> None:
        self._submit = submit
        self._context = full_blocks * block_size
        self._blocks = list(range(-(-(self._context + _ROOM + 1) // block_size)))
        self._lengths: dict[str, int] = {}

    def start(self, count: int) -> None:
        """Begin `count` requests, and run a step that is not measured: whatever it needs for the first time is there afterwards."""
        keys = [f"calibration/{index}" for index in range(count)]
        new = [self._new(key) for key in keys]
        self._lengths = dict.fromkeys(keys, self._context + 1)
        self._run(SchedulerOutput(0, new_requests=new, num_scheduled_tokens=dict.fromkeys(keys, 1)))

    def finish(self) -> None:
        """Forget the requests."""
        self._submit(SchedulerOutput(0, finished_keys=list(self._lengths))).result()
        self._lengths = {}

    def step_seconds(self, num_drafts: int) -> float:
        """What a step takes in which every request has `num_drafts` drafts."""

        def measure() -> float:
            begun = time.perf_counter()
            self._decode(num_drafts=num_drafts)
            return time.perf_counter() - begun

        return _fastest(measure, _REPEATS)

    def draft_seconds(self, *, patient: bool) -> tuple[float, float]:
        """What it takes to propose a token for every request, and each token more. patient: the context is to be computed first."""
        for _ in range(_MAX_CATCH_UP_CALLS if patient else 1):
            if self._decode(num_proposals=1).draft_token_ids:
                break
        one = _fastest(lambda: self._decode(num_proposals=1).draft_seconds, _DRAFT_REPEATS)
        some = _fastest(lambda: self._decode(num_proposals=_PROPOSALS).draft_seconds, _DRAFT_REPEATS)
        return one, max(some - one, 0.0) / (_PROPOSALS - 1)

    def _decode(self, *, num_drafts: int = 0, num_proposals: int = 0) -> RunnerOutput:
        keys = list(self._lengths)
        return self._run(
            SchedulerOutput(
                0,
                cached_requests=[CachedRequest(key, [], length - 1) for key, length in self._lengths.items()],
                num_scheduled_tokens=dict.fromkeys(keys, 1 + num_drafts),
                draft_token_ids={key: [0] * num_drafts for key in keys} if num_drafts else {},
                num_proposals=dict.fromkeys(keys, num_proposals) if num_proposals else {},
            )
        )

    def _run(self, step: SchedulerOutput) -> RunnerOutput:
        output = self._submit(step).result()
        for key, token_ids in output.sampled_token_ids.items():
            self._lengths[key] += len(token_ids)
        return output

    def _new(self, key: str) -> NewRequest:
        """All but the last token are said to be computed, so that the draft model finds whole blocks."""
        return NewRequest(
            key=key,
            token_ids=[0] * (self._context + 1),
            num_prompt_tokens=self._context + 1,
            num_computed_tokens=self._context,
            block_ids=self._blocks,
            sampling=_SAMPLING,
            seed=0,
            sample_index=0,
        )


def _fastest(measure: Callable[[], float], repeats: int) -> float:
    """Seconds of the fastest of some repetitions, or of one that is slow."""
    seconds = [measure()]
    while len(seconds) < repeats and seconds[0] < _SLOW_SECONDS:
        seconds.append(measure())
    return min(seconds)
