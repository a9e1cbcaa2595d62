"""A launched step: what the host remembers of it until its result is taken, and what is on its way from the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from penstock.core.types import TokenLogprobs
from penstock.engine.step import RequestKey, RunnerOutput
from penstock.execution.runner.accelerator import Mark
from penstock.execution.runner.batch import IntArray, StepShape
from penstock.execution.runner.outputs import PromptLogprobPlan
from penstock.execution.sampling.logprobs import LogprobRows
from penstock.execution.sampling.verification import DraftRows, VerifiedTokens

_NO_ROWS: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class FetchedLogprobs:
    """Log-probabilities on their way to the host: pinned [L], [L], [L, K], [L, K]; see LogprobRows."""

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def __len__(self) -> int:
        return len(self.logprobs)

    def structs(self, token_ids: IntArray, num_top: list[int]) -> list[TokenLogprobs]:
        """The wire form, when they have arrived."""
        rows = LogprobRows(
            token_ids, self.logprobs.numpy(), self.ranks.numpy(), self.top_ids.numpy(), self.top_logprobs.numpy()
        )
        return rows.to_structs(num_top)


@dataclass(eq=False)
class Flight:
    """A step between its launch and its result.

    shape: None when the step had nothing to run. incarnations [R]: which requests were in the slots; dropped: those of them that an
    earlier step found failed when this one was launched already. drafts: of each request that samples, where the step verifies any; rows
    are then as DraftRows has them, else one for each of these requests. tokens: int64 [M], pinned, -1 where a row failed; logprobs: of
    the rows logprob_rows of these, with num_top alternatives. num_proposals: drafts wanted afterwards. start, end: marks around its
    work; idle_since: the end of the step before.
    """

    output: RunnerOutput
    shape: StepShape | None = None
    incarnations: IntArray = field(default_factory=lambda: _NO_ROWS)
    dropped: set[int] = field(default_factory=set)
    drafts: list[list[int]] | None = None
    tokens: Tensor | None = None
    logprob_rows: IntArray = field(default_factory=lambda: _NO_ROWS)
    num_top: list[int] = field(default_factory=list)
    logprobs: FetchedLogprobs | None = None
    prompt_plan: PromptLogprobPlan | None = None
    prompt_logprobs: list[FetchedLogprobs] = field(default_factory=list)
    num_proposals: dict[RequestKey, int] = field(default_factory=dict)
    start: Mark | None = None
    end: Mark | None = None
    idle_since: Mark | None = None

    def add_times(self) -> None:
        """What the step took on the device, to `output`."""
        if self.start is None or self.end is None:
            return
        self.output.device_seconds = self.end.seconds_since(self.start)
        if self.idle_since is not None:
            self.output.device_idle_seconds = max(0.0, self.start.seconds_since(self.idle_since))

    def sampled_logprobs(self, token_ids: IntArray) -> list[TokenLogprobs]:
        """Of token_ids [M], those of `logprob_rows`."""
        return [] if self.logprobs is None else self.logprobs.structs(token_ids[self.logprob_rows], self.num_top)

    def verified(self, token_ids: IntArray, drafts: list[list[int]]) -> VerifiedTokens:
        """What token_ids [M], -1 where a row failed, give each of the requests with these drafts."""
        rows = DraftRows(drafts)
        num_new, failed = rows.outcome(token_ids, token_ids < 0)
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for row, entry in zip(self.logprob_rows.tolist(), self.sampled_logprobs(token_ids), strict=True):
            request = int(rows.request[row])
            if rows.offset[row] < num_new[request] and not failed[request]:
                logprobs.setdefault(request, []).append(entry)
        return VerifiedTokens(rows.new_tokens(token_ids, num_new, failed), failed, logprobs)

    def add_prompt_logprobs(self) -> None:
        """What was found out of prompts, to `output`."""
        plan = self.prompt_plan
        if plan is None:
            return
        entries: list[TokenLogprobs] = []
        for fetched in self.prompt_logprobs:
            part = slice(len(entries), len(entries) + len(fetched))
            entries += fetched.structs(plan.targets[part], plan.num_top[part])
        plan.add_to(self.output, entries)


class LaunchedStep:
    """See StepHandle. `take` waits for the step and says what it produced."""

    def __init__(self, flight: Flight, take: Callable[[Flight], RunnerOutput]) -> None:
        self._flight = flight
        self._take = take

    def done(self) -> bool:
        return self._flight.end is not None and self._flight.end.reached()

    def result(self) -> RunnerOutput:
        return self._take(self._flight)
