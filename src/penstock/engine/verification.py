"""Draft tokens in the schedule: what a step verifies, what it asks to be proposed next, and what becomes of refused drafts.

A request whose last token alone is not computed has its drafts scheduled behind it. How far they were right is known when the step has
retired; until then the request is in no other step. Here three drafts, of which the second was wrong:

    before       [ computed … ][ t ]                     t: the last known token
    in flight    [ computed …    t   d1   d2   d3 ]      scheduled: 4
    sampled                      ▼    ▼
                                 d1   s                  s ≠ d2, so d3 was never looked at
    after        [ computed …    t   d1 ][ s ]           set back by the two refused ones, whose slots the next step overwrites

A step asks for the next drafts and takes the blocks that they will need (look-ahead) from what everybody else in it leaves free: nobody is
preempted for a guess, and where there is no room there are fewer. It is the same with the step's tokens: drafts are verified with what
the decoding requests' own tokens and prompts leave.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.errors import IntegrityError
from penstock.engine.grammar import masks_along
from penstock.engine.kv_cache_manager import KVCacheManager
from penstock.engine.plan import StepPart, StepPlan
from penstock.engine.request import Request
from penstock.engine.room import promised_blocks
from penstock.engine.speculation import SpeculationController
from penstock.engine.step import RunnerOutput


@dataclass(slots=True)
class SpeculationCounts:
    """What has been verified so far: steps of requests that had drafts, their drafts, and those that were right."""

    verifications: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


class Verification:
    """Adds drafts and proposals to steps and takes in what became of them. `controller` chooses how many there are."""

    def __init__(self, kv: KVCacheManager, controller: SpeculationController) -> None:
        self.counts = SpeculationCounts()
        self._kv = kv
        self._controller = controller

    # ---- a step is made ----

    def add_drafts(self, plan: StepPlan) -> None:
        """Have drafts verified of those requests in the step that have some, with the tokens that the step has left. They have blocks: a
        request gets them with the step that asks for its drafts, and loses both together."""
        for request, num_tokens in list(plan.scheduled.items()):
            drafts, request.draft_token_ids = request.draft_token_ids, []
            if not drafts:
                continue
            # The last token of an output is not guessed: the one before it is computed anyway, and that samples it.
            most = min(plan.budget, request.room_after(request.num_computed_tokens + num_tokens) - 1)
            drafts = _until_stop(drafts[: max(0, most)], request)
            if request.matcher is not None:
                drafts, plan.masks[request] = masks_along(request.matcher, drafts)
                if not drafts:
                    self._controller.verified(request.key, 1, 0)  # the first one was wrong, which the grammar knew
            if drafts:
                plan.add_drafts(request, drafts)

    def ask_proposals(self, plan: StepPlan) -> None:
        """Ask for drafts of the requests that sample in this step, as many as the controller wants and blocks allow."""
        if self._controller.rests(len(plan.scheduled)):
            return
        askable: list[tuple[Request, int, int]] = []
        num_others = 0
        for request, num_tokens in plan.scheduled.items():
            num_drafts = len(plan.drafts.get(request, ()))
            end = request.num_computed_tokens + num_tokens
            if end - num_drafts < request.num_tokens + request.num_pending:
                continue  # does not sample
            room = request.room_after(end)
            # All of these drafts may turn out right, or none: proposals must have positions behind them in the first case, and leave one
            # token to sample in the second.
            most = min(room - 1, room + num_drafts - 2)
            if most > 0:
                askable.append((request, end, most))
            elif room + num_drafts > 1:
                num_others += 1
        if not askable:
            return
        wanted = self._controller.plan([request.key for request, _, _ in askable], num_others)
        if not any(wanted):
            return
        spare = max(0, self._kv.pool.num_free - promised_blocks(self._kv, plan))
        for (request, end, most), count in zip(askable, wanted, strict=True):
            # Behind `end` computed tokens stands one that is sampled, then the proposals.
            room = (len(request.block_ids) + spare) * self._kv.block_size
            num_proposals = min(count, most, room - end - 1)
            if num_proposals > 0:
                plan.proposals[request] = num_proposals
                spare -= self._take_blocks(plan, request, end + 1 + num_proposals)

    def _take_blocks(self, plan: StepPlan, request: Request, num_tokens: int) -> int:
        blocks = self._kv.extend(request, num_tokens)
        if blocks is None:
            raise IntegrityError(f"{request!r} is asked for more drafts than there are blocks for")
        if blocks:
            plan.new_blocks[request] = [*plan.new_blocks[request], *blocks]
        return len(blocks)

    # ---- a step has retired ----

    def settle(self, part: StepPart, sampled: list[int], *, is_current: bool) -> None:
        """Drafts of a request were verified: `sampled` are its new tokens. A request that still has the blocks of that step
        (`is_current`) is set back to its last computed token that was right."""
        num_drafts = len(part.drafts)
        num_accepted = len(sampled) - 1
        if not 0 <= num_accepted <= num_drafts or sampled[:num_accepted] != part.drafts[:num_accepted]:
            raise IntegrityError(f"{part.request!r} had the drafts {part.drafts} verified and got {sampled}")
        if is_current:
            part.request.num_computed_tokens -= num_drafts - num_accepted
            part.request.num_retired_tokens -= num_drafts - num_accepted
        self.counts.verifications += 1
        self.counts.draft_tokens += num_drafts
        self.counts.accepted_draft_tokens += num_accepted
        self._controller.verified(part.request.key, num_drafts, num_accepted)

    def take_proposals(self, part: StepPart, output: RunnerOutput) -> None:
        """Keep what was proposed for a request that goes on."""
        proposals = output.draft_token_ids.get(part.request.key, [])[: part.num_proposals]
        part.request.draft_token_ids = proposals

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._controller.forget(request.key)


def _until_stop(drafts: list[int], request: Request) -> list[int]:
    """The drafts before the first one that would end the request: it is sampled behind these, and nothing behind it."""
    for index, draft in enumerate(drafts):
        if draft in request.stop_token_ids:
            return drafts[:index]
    return drafts
