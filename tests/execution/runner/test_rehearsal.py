"""The steps that run at the start, through a runner on the host: whatever they are, they have to be steps that a scheduler might send."""

from __future__ import annotations

import dataclasses

import pytest

from penstock.core.config import EngineConfig
from penstock.engine.step import SchedulerOutput
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.rehearsal import (
    full_steps,
    proposal_steps,
    small_steps,
    varied_steps,
    verification_steps,
)
from tests.execution.runner.harness import BLOCK_SIZE, Harness

CONFIG = EngineConfig(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=128, block_size=BLOCK_SIZE)


def _run(loaded: LoadedModel, steps: list[SchedulerOutput], num_blocks: int) -> list[int]:
    """Run the steps in a cache of `num_blocks` blocks; how many tokens each sampled. Nothing may be left behind."""
    harness = Harness(loaded, num_blocks=num_blocks, max_slots=20)
    outputs = [harness.runner.execute(step) for step in steps]
    assert len(harness.batch) == 0
    assert not any(output.errors for output in outputs)
    return [len(output.sampled_token_ids) for output in outputs]


def test_small_steps_are_a_prefill_and_a_decode(loaded: LoadedModel) -> None:
    assert _run(loaded, small_steps(CONFIG, 64), 64) == [1, 1, 0]
    assert _run(loaded, small_steps(CONFIG, 1), 1) == [1, 1, 0]
    assert _run(loaded, small_steps(dataclasses.replace(CONFIG, max_model_len=1), 1), 1) == [1, 0]


@pytest.mark.parametrize(("budget", "num_seqs", "expected"), [(40, 6, 6), (41, 6, 6), (4, 6, 4), (128, 1, 1)])
def test_full_steps_fill_budget_and_batch(loaded: LoadedModel, budget: int, num_seqs: int, expected: int) -> None:
    config = dataclasses.replace(CONFIG, max_num_batched_tokens=budget, max_num_seqs=num_seqs)
    steps = full_steps(config)
    assert steps[0].total_tokens == min(budget, num_seqs * (config.max_model_len - 1))
    assert _run(loaded, steps, 1) == [expected, expected, 0]


def test_varied_steps_stay_within_the_limits(loaded: LoadedModel) -> None:
    config = dataclasses.replace(CONFIG, max_num_batched_tokens=80, max_num_seqs=17)
    steps = varied_steps(config)
    _run(loaded, steps, 1)
    assert max(step.total_tokens for step in steps) <= 80
    assert max(len(step.num_scheduled_tokens) for step in steps) == 17
    mixed = [list(step.num_scheduled_tokens.values()) for step in steps if step.cached_requests]
    assert mixed == [[1] * decodes + [tokens] for decodes in (1, 3, 16) for tokens in (64, 61)]
    assert varied_steps(dataclasses.replace(CONFIG, max_num_batched_tokens=8)) == []


@pytest.mark.parametrize(("num_drafts", "num_requests", "expected"), [(4, 99, 6), (9, 99, 4), (4, 1, 1), (39, 6, 1)])
def test_verifications_go_as_far_as_budget_and_batch(
    loaded: LoadedModel, num_drafts: int, num_requests: int, expected: int
) -> None:
    steps = verification_steps(CONFIG, num_drafts, num_requests)
    assert _run(loaded, steps, 1) == [expected, expected, 0]
    assert steps[1].total_tokens == expected * (1 + num_drafts)


def test_there_is_nothing_to_verify_where_no_draft_fits() -> None:
    assert verification_steps(CONFIG, 0, 6) == []
    assert verification_steps(CONFIG, 40, 6) == []
    assert verification_steps(dataclasses.replace(CONFIG, max_model_len=5), 4, 6) == []


def test_proposals_stay_within_the_blocks(loaded: LoadedModel) -> None:
    steps = proposal_steps(CONFIG, 3, 3)
    assert _run(loaded, steps, 3) == [1, 0]
    (count,) = steps[0].num_proposals.values()
    assert count == 3
    assert proposal_steps(CONFIG, 4, 3) == []
    assert proposal_steps(CONFIG, 0, 64) == []
