"""What the scheduler keeps of a step: while it is being filled, while it is in flight, and what it meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.core.types import FinishReason, TokenLogprobs
from penstock.engine.request import Request
from penstock.engine.step import NewRequest, SchedulerOutput


@dataclass(slots=True)
class StepPlan:
    """A step being filled: what is left of the budgets, who got how many tokens, how many requests began to run or were displaced.
    `prompts`: running requests whose known tokens are not all computed; they were admitted because all of these fit, so blocks that they
    do not have yet are promised to them. `prompt_places`: how many more requests with more than one token this step takes.
    `outgrown`: running requests ran out of blocks, so that nobody is admitted. `drafts`: what is verified (counted in `scheduled`),
    `proposals`: how many are asked for, `masks`: for each token that is sampled of a request with a grammar."""

    budget: int
    prefill_budget: int
    scheduled: dict[Request, int] = field(default_factory=dict)
    new_blocks: dict[Request, list[int]] = field(default_factory=dict)
    prompts: list[Request] = field(default_factory=list)
    prompt_places: int = 2**31
    drafts: dict[Request, list[int]] = field(default_factory=dict)
    proposals: dict[Request, int] = field(default_factory=dict)
    masks: dict[Request, list[bytes]] = field(default_factory=dict)
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

    def add_drafts(self, request: Request, drafts: list[int]) -> None:
        """Verify drafts of a request that is in the step with its last known token."""
        self.drafts[request] = drafts
        self.scheduled[request] += len(drafts)
        self.budget -= len(drafts)

    def remove(self, request: Request) -> None:
        num_tokens = self.scheduled.pop(request, 0)
        self.new_blocks.pop(request, None)
        self.budget += num_tokens

    def ordered(self) -> list[tuple[Request, int]]:
        """The requests of the step with their numbers of tokens: first those with one token, then those with drafts, then prompts."""
        # Stable, and decodes were scheduled before prompts.
        return sorted(self.scheduled.items(), key=lambda item: item[1] > 1)

    def share_of(self, wanted: int) -> int:
        """How many of the `wanted` tokens of a request this step may still run."""
        return min(wanted, self.budget) if wanted == 1 else min(wanted, self.budget, max(self.prefill_budget, 0))


class StepPart(NamedTuple):
    """One request's part of a step in flight. `samples`: the step catches up with the request and samples its next token, or several
    where it verifies `drafts`. `num_proposals`: how many drafts it was asked for."""

    request: Request
    num_tokens: int
    epoch: int
    samples: bool
    drafts: Sequence[int] = ()
    num_proposals: int = 0


@dataclass(slots=True)
class InflightStep:
    """`binds`: its requests cannot be in another step before its result is known. `void`: its result is worth nothing."""

    output: SchedulerOutput
    parts: list[StepPart]
    binds: bool = False
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


def new_request(request: Request) -> NewRequest:
    """The request as the runner gets to know it."""
    return NewRequest(
        key=request.key,
        token_ids=list(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        num_computed_tokens=request.num_computed_tokens,
        block_ids=list(request.block_ids),
        sampling=request.sampling,
        seed=request.seed,
        sample_index=request.index,
        prompt_logprobs_start=request.next_prompt_logprob,
    )
