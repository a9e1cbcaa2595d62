"""What the scheduler keeps of a step: while it is being filled, while it is in flight, and what it meant."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.types import FinishReason, TokenLogprobs
from penstock.engine.request import Request
from penstock.engine.step import SchedulerOutput


@dataclass(slots=True)
class StepPlan:
    """A step being filled: what is left of the budgets, who got how many tokens, how many requests began to run or were displaced.
    `prompts`: running requests whose known tokens are not all computed; they were admitted because all of these fit, so blocks that they
    do not have yet are promised to them. `outgrown`: running requests ran out of blocks, so that nobody is admitted."""

    budget: int
    prefill_budget: int
    scheduled: dict[Request, int] = field(default_factory=dict)
    new_blocks: dict[Request, list[int]] = field(default_factory=dict)
    prompts: list[Request] = field(default_factory=list)
    num_admitted: int = 0
    num_displaced: int = 0
    outgrown: bool = False

    def add(self, request: Request, num_tokens: int, wanted: int, new_blocks: list[int]) -> None:
        """Schedule `num_tokens` of the `wanted` tokens that the request could use."""
        self.scheduled[request] = num_tokens
        self.new_blocks[request] = new_blocks
        self.budget -= num_tokens
        if wanted > 1:
            self.prefill_budget -= num_tokens

    def remove(self, request: Request) -> None:
        num_tokens = self.scheduled.pop(request, 0)
        self.new_blocks.pop(request, None)
        self.budget += num_tokens

    def share_of(self, wanted: int) -> int:
        """How many of the `wanted` tokens of a request this step may still run."""
        return min(wanted, self.budget) if wanted == 1 else min(wanted, self.budget, max(self.prefill_budget, 0))


@dataclass(frozen=True, slots=True)
class StepPart:
    """One request's part of a step in flight. `samples`: the step catches up with the request and samples its next token."""

    request: Request
    num_tokens: int
    epoch: int
    samples: bool


@dataclass(slots=True)
class InflightStep:
    output: SchedulerOutput
    parts: list[StepPart]
    void: bool = False


@dataclass(frozen=True, slots=True)
class Update:
    """What a retired step means for one request. `offset`: output tokens before `token_ids`."""

    request: Request
    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
