"""Which tokens of which requests run in the next step.

There is no prefill and no decode here. Every request has tokens (prompt, output, and tokens being sampled by steps in flight) and a
number of them that are computed; each step hands out a token budget until the second catches up with the first. Chunked prefill,
prefix hits, recompute after preemption and resumption elsewhere are this one rule.

Order within a step: requests that run and need one token (their rhythm is what users see), requests that run and need more, then
admissions, except those that the policy puts before the rest of a running prompt. While others decode, prompts together get at most
`max_prefill_tokens_while_decoding`.

This file holds the rule and the bookkeeping of steps. It must not learn about text, devices, clients, tenants or metrics: ordering belongs
to policy.py and fairness.py, blocks to kv_cache_manager.py, outcomes and deltas to engine.py.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict

from penstock.core.errors import IntegrityError
from penstock.core.types import LiveLimits
from penstock.engine.grammar import masks_along
from penstock.engine.kv_cache_manager import KVCacheManager
from penstock.engine.micro_batches import MicroBatches
from penstock.engine.outcome import append_tokens, keep_prompt_logprobs
from penstock.engine.plan import InflightStep, StepPart, StepPlan, Update, new_request
from penstock.engine.policy import Policy, Room
from penstock.engine.request import Request, RequestStatus
from penstock.engine.room import choose_victims, may_fork, promised_blocks
from penstock.engine.speculation import SpeculationController
from penstock.engine.step import CachedRequest, RequestKey, RunnerOutput, SchedulerOutput
from penstock.engine.verification import Verification


class Scheduler:
    """Requests in, steps out; results in, updates out. Single-threaded.

    `ceiling`: the start-up values of the live limits. `speculation` chooses draft lengths; without it there are no drafts.
    `micro_batches`: see micro_batches.py. Call `schedule` and hand its steps to an executor; call `update` (or `fail`) once for every step,
    in order.
    """

    def __init__(
        self,
        kv: KVCacheManager,
        policy: Policy,
        ceiling: LiveLimits,
        speculation: SpeculationController | None = None,
        micro_batches: int = 1,
    ) -> None:
        self.kv = kv
        self.policy = policy
        self.limits = ceiling
        self.verification = None if speculation is None else Verification(kv, speculation)
        self.micro_batches = micro_batches
        self.requests: dict[RequestKey, Request] = {}
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._inflight: OrderedDict[int, InflightStep] = OrderedDict()
        self._next_step_id = 0
        self._finished_keys: list[RequestKey] = []
        self._preempted_keys: list[RequestKey] = []
        self._suspects: list[Request] = []
        self._num_matchers = 0

    # ---- requests come and go ----

    def add(self, request: Request) -> None:
        """Queue a request; with a leader it waits until the leader has computed the prompt that they share."""
        self.requests[request.key] = request
        self._num_matchers += request.matcher is not None
        self.policy.arrived(request)
        if request.leader is None:
            self.policy.push(request)
        else:
            request.status = RequestStatus.FOLLOWING
            request.leader.followers.append(request)

    def finish(self, request: Request) -> None:
        """Take a request out, whatever it is doing. Its blocks come back when no step in flight touches them."""
        if request.finished:
            return
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.policy.discard(request)
        elif request.leader is not None:
            request.leader.followers.remove(request)
        request.status = RequestStatus.FINISHED
        self.kv.release(request)
        del self.requests[request.key]
        self._num_matchers -= request.matcher is not None
        if self.verification is not None:
            self.verification.forget(request)
        if request in self._suspects:
            self._suspects.remove(request)
        if request.known_to_runner:
            self._finished_keys.append(request.key)
        self._release_followers(request)
        self.policy.departed(request)

    @property
    def num_inflight(self) -> int:
        return len(self._inflight)

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - len(self.running)

    def has_work(self) -> bool:
        return bool(self.requests or self._inflight)

    # ---- one step ----

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when nothing can run before a step in flight retires (or at all)."""
        if self._is_bound:
            return None
        plan = StepPlan(self._token_budget, self._token_budget)
        speculation = None if self._suspects else self.verification
        if self._suspects:
            self._schedule_suspect(plan)
        else:
            self._schedule_running(plan)
            self._schedule_waiting(plan)
        if not plan.scheduled:
            return None
        if speculation is not None:
            speculation.add_drafts(plan)
            speculation.ask_proposals(plan)
        if self._num_matchers:
            self._add_masks(plan)
        return self._commit(plan)

    @property
    def _is_bound(self) -> bool:
        """Whether the next step has to wait for a result. Some requests cannot run before that of a step in flight is known, for what they
        start from, or may be given, depends on it. The others wait for them, and a pipeline that is full takes no further step: more parts
        than necessary would each read all weights, and each request would wait for all of them."""
        if self.micro_batches > 1:
            return len(self._inflight) >= self.micro_batches
        return bool(self._inflight) and self._inflight[next(reversed(self._inflight))].binds

    @property
    def _token_budget(self) -> int:
        budget = self.limits.max_num_batched_tokens
        return budget if budget is not None else 2**31

    @property
    def _max_num_seqs(self) -> int:
        return self.limits.max_num_seqs or 2**31

    def _schedule_running(self, plan: StepPlan) -> None:
        # Who wants how many tokens is asked once: with hundreds of requests this is what a step's scheduling takes.
        wanted = {request: request.num_uncomputed_tokens for request in self.running}
        decoding = [request for request, num_wanted in wanted.items() if num_wanted == 1]
        prompts = [request for request, num_wanted in wanted.items() if num_wanted > 1]
        if self.micro_batches > 1:
            parts = MicroBatches(self.micro_batches, len(self._inflight))
            decoding = parts.next_decodes(decoding)
            # One that waits counts even where there is no place: it may displace somebody.
            num_waiting = min(self.num_waiting, max(1, self._max_num_seqs - len(self.running)))
            plan.prompt_places = parts.share(self.running, num_waiting) - len(decoding)
        if len(decoding) > plan.budget:
            decoding = self.policy.arrange(decoding)
        for request in decoding:
            self._extend(plan, request, 1)
        cap = self.limits.max_prefill_tokens_while_decoding
        if plan.scheduled and cap is not None:
            plan.prefill_budget = min(plan.budget, cap)
        plan.prompts = self.policy.arrange(prompts)
        for request in plan.prompts[:]:
            self._schedule_waiting(plan, before=request)
            if plan.prompt_places > 0 and (self.micro_batches == 1 or not request.num_inflight):
                self._extend(plan, request, wanted[request])

    def _extend(self, plan: StepPlan, request: Request, wanted: int) -> None:
        """Schedule up to `wanted` tokens of a running request, preempting from the end of the order to make room."""
        if request.status is not RequestStatus.RUNNING:
            return  # preempted for another one
        num_tokens = plan.share_of(wanted)
        if num_tokens <= 0:
            return
        target = request.num_computed_tokens + num_tokens
        while (blocks := self.kv.extend(request, target)) is None:
            missing = self.kv.blocks_for(target) - len(request.block_ids)
            if self.kv.num_deferred and self.kv.pool.num_free + self.kv.num_deferred >= missing:
                return  # room comes back with the steps in flight
            if plan.num_admitted:
                return  # the moves of this step count on the blocks of those that run
            victim = self.policy.victim(self.running)
            self._preempt(plan, victim)
            plan.outgrown = True
            if victim is request:
                return
        plan.add(request, num_tokens, wanted, blocks)
        plan.prompt_places -= wanted > 1

    def _schedule_waiting(self, plan: StepPlan, before: Request | None = None) -> None:
        """Admit waiting requests in the policy's order; with `before`, only those whose turn is before that running one's."""
        while plan.budget > 0 and plan.prompt_places > 0 and not plan.outgrown and self._admit_next(plan, before):
            pass

    def _admit_next(self, plan: StepPlan, before: Request | None) -> bool:
        for rank, request in enumerate(self.policy.heads()):
            if before is not None and not self.policy.precedes(request, before):
                return False
            if request.num_inflight:
                continue  # preempted; its last tokens are not known yet
            if len(self.running) < self._max_num_seqs:
                # Memory that is not enough is kept for whose turn it is, or large prompts would wait for ever.
                return self._admit(plan, request) or (self._make_room(plan, request) and self._admit(plan, request))
            if self._make_room(plan, request, only_place=rank > 0) and self._admit(plan, request):
                return True
        return False

    def _make_room(self, plan: StepPlan, request: Request, *, only_place: bool = False) -> bool:
        """Preempt those that the policy lets `request` displace, if that makes room for it. `only_place`: see `choose_victims`."""
        room = Room(self._max_num_seqs, self._token_budget, self.kv.pool.num_blocks)
        victims = choose_victims(self.kv, self.policy, plan, request, self.running, room, only_place=only_place)
        for victim in victims:
            self._preempt(plan, victim)
        plan.num_displaced += len(victims)
        return bool(victims)

    def _admit(self, plan: StepPlan, request: Request) -> bool:
        """Move a waiting request to running and schedule its first tokens. False when budget or blocks are short."""
        if request.leader is not None and may_fork(request):
            return self._admit_fork(plan, request, request.leader)
        match = self.kv.match_prefix(request)
        request.num_computed_tokens = match.num_tokens
        num_tokens = plan.share_of(request.num_uncomputed_tokens)
        # A prompt that is admitted piece by piece must fit as a whole, or several would grow into each other.
        if num_tokens <= 0 or self.kv.missing(request, match, request.num_tokens) + promised_blocks(self.kv, plan) > 0:
            request.num_computed_tokens = 0
            return False
        self.kv.admit(request, match, match.num_tokens + num_tokens)
        self._start(plan, request, num_tokens, match.num_tokens)
        return True

    def _admit_fork(self, plan: StepPlan, request: Request, leader: Request) -> bool:
        if self.kv.pool.num_free <= promised_blocks(self.kv, plan):
            return False
        if not self.kv.fork(request, leader, request.num_prompt_tokens):
            return False
        request.num_computed_tokens = request.num_prompt_tokens - 1
        self._start(plan, request, 1, leader.num_cached_tokens)
        return True

    def _start(self, plan: StepPlan, request: Request, num_tokens: int, num_cached_tokens: int) -> None:
        self.policy.discard(request)
        request.leader = None
        request.status = RequestStatus.RUNNING
        request.num_retired_tokens = request.num_computed_tokens
        if request.epoch == 0:
            request.num_cached_tokens = min(num_cached_tokens, request.num_prompt_tokens)
        request.num_charged_tokens = max(request.num_charged_tokens, request.num_computed_tokens)
        # At once, so that the next admission of this step is another tenant's.
        self.policy.charge({request: num_tokens})
        bisect.insort(self.running, request, key=self.policy.key)
        plan.add(request, num_tokens, request.num_uncomputed_tokens, [])
        plan.prompts.append(request)
        plan.prompt_places -= 1
        plan.num_admitted += 1

    def _schedule_suspect(self, plan: StepPlan) -> None:
        """After a failed step its requests run one at a time, so that the one that makes steps fail fails alone."""
        request = self._suspects[0]
        if self._inflight:
            return
        if request.status is RequestStatus.FOLLOWING:
            raise IntegrityError(f"{request!r} is suspect but never ran")
        while request.status is RequestStatus.WAITING:
            if self._admit(plan, request):
                return
            self._preempt(plan, self.running[-1])
        self._extend(plan, request, request.num_uncomputed_tokens)

    def _preempt(self, plan: StepPlan | None, request: Request) -> None:
        """Take the blocks from a running request; it is computed again later, from prompt and output so far."""
        if plan is not None:
            plan.remove(request)
        self.running.remove(request)
        self.kv.release(request)
        request.num_computed_tokens = 0
        request.num_retired_tokens = 0
        request.draft_token_ids = []
        request.epoch += 1
        if request.known_to_runner:
            self._preempted_keys.append(request.key)
            request.known_to_runner = False
        self.policy.push(request)
        self._release_followers(request)
        self.num_preemptions += 1

    def _release_followers(self, leader: Request) -> None:
        """The leader has computed the prompt (its followers may now share it) or never will (the first follower leads)."""
        followers, leader.followers = leader.followers, []
        if not followers:
            return
        if leader.status is RequestStatus.RUNNING:
            for follower in followers:
                self.policy.push(follower)
            return
        first, *others = followers
        first.leader = None
        first.followers = others
        for follower in others:
            follower.leader = first
        self.policy.push(first)

    def _commit(self, plan: StepPlan) -> SchedulerOutput:
        step = SchedulerOutput(self._next_step_id)
        self._next_step_id += 1
        moves = self.kv.take_moves(step.step_id)
        step.swap_outs, step.swap_ins, step.block_copies = moves.swap_outs, moves.swap_ins, moves.copies
        step.finished_keys, self._finished_keys = self._finished_keys, []
        step.preempted_keys, self._preempted_keys = self._preempted_keys, []
        self.policy.charge(plan.scheduled)
        parts = []
        for request, num_tokens in plan.ordered():
            drafts = plan.drafts.get(request, ())
            step.num_scheduled_tokens[request.key] = num_tokens
            if request.known_to_runner:
                step.cached_requests.append(
                    CachedRequest(request.key, plan.new_blocks[request], request.num_computed_tokens)
                )
            else:
                step.new_requests.append(new_request(request))
                request.known_to_runner = True
            request.num_computed_tokens += num_tokens
            request.num_inflight += 1
            request.last_step_id = step.step_id
            samples = request.num_computed_tokens == request.num_tokens + request.num_pending + len(drafts)
            request.num_pending += samples
            num_proposals = plan.proposals.get(request, 0)
            parts.append(StepPart(request, num_tokens, request.epoch, samples, drafts, num_proposals))
            if request.followers and request.num_computed_tokens >= request.num_prompt_tokens:
                self._release_followers(request)
        step.draft_token_ids = {request.key: drafts for request, drafts in plan.drafts.items()}
        step.num_proposals = {request.key: count for request, count in plan.proposals.items()}
        step.token_masks = {request.key: masks for request, masks in plan.masks.items()}
        binds = bool(plan.drafts or plan.proposals or plan.masks)
        self._inflight[step.step_id] = InflightStep(step, parts, binds)
        return step

    @staticmethod
    def _add_masks(plan: StepPlan) -> None:
        """Masks of those requests that sample and have no drafts; with drafts they were made with these."""
        for request, num_tokens in plan.scheduled.items():
            if request.matcher is not None and request not in plan.masks:
                samples = request.num_computed_tokens + num_tokens == request.num_tokens + request.num_pending
                if samples:
                    plan.masks[request] = masks_along(request.matcher, ())[1]

    # ---- results come back ----

    def update(self, output: RunnerOutput) -> list[Update]:
        """Take in the result of the oldest step in flight."""
        step = self._retire(output.step_id)
        updates = []
        for part in step.parts:
            request = part.request
            request.num_inflight -= 1
            request.num_pending -= part.samples
            if step.void or request.finished:
                continue
            if output.errors and request.key in output.errors:
                updates.append(self._finish_with_error(request, output.errors[request.key]))
                continue
            if output.prompt_logprobs:
                keep_prompt_logprobs(request, output)
            is_current = part.epoch == request.epoch
            if is_current:
                request.num_retired_tokens += part.num_tokens
                if self._suspects and part.samples and request in self._suspects:
                    self._suspects.remove(request)
            if part.samples:
                updates.append(self._sampled(part, output, is_current=is_current))
            if is_current and not request.finished:
                self.kv.cache_computed_blocks(request)
                if part.num_proposals and self.verification is not None:
                    self.verification.take_proposals(part, output)
        return updates

    def _sampled(self, part: StepPart, output: RunnerOutput, *, is_current: bool) -> Update:
        """The request of this part has new tokens."""
        request = part.request
        sampled = output.sampled_token_ids.get(request.key)
        if not sampled or len(sampled) > 1 + len(part.drafts):
            raise IntegrityError(f"step {output.step_id} has the tokens {sampled} for {request!r}")
        if part.drafts and self.verification is not None:
            self.verification.settle(part, sampled, is_current=is_current)
        update = append_tokens(request, sampled, output.logprobs.get(request.key))
        if update.finish_reason is not None:
            # The blocks of a finished request are the likeliest to be asked for again: name them first.
            if request.block_ids:
                self.kv.cache_computed_blocks(request)
            self.finish(request)
        return update

    def fail(self, step_id: int, error: str) -> list[Update]:
        """The oldest step in flight raised. Its results and those of later steps in flight are lost.

        A request that was alone in it fails; several are preempted and then run one at a time, to find out whose fault it was.
        """
        step = self._retire(step_id, failed=True)
        for later in self._inflight.values():
            later.void = True
        updates = []
        alive = [part.request for part in step.parts if not part.request.finished]
        for part in step.parts:
            part.request.num_inflight -= 1
            part.request.num_pending -= part.samples
        if len(step.parts) == 1 and alive and not step.void:
            updates.append(self._finish_with_error(alive[0], error))
            alive = []
        for request in alive:
            if not step.void and request not in self._suspects:
                self._suspects.append(request)
        lost = {part.request for later in self._inflight.values() for part in later.parts} | set(alive)
        for request in sorted(lost, key=self.policy.key):
            if request.status is RequestStatus.RUNNING:
                self._preempt(None, request)
        return updates

    def _finish_with_error(self, request: Request, error: str) -> Update:
        self.finish(request)
        return Update(request, request.num_output_tokens, [], finish_reason="error", error=error)

    def _retire(self, step_id: int, *, failed: bool = False) -> InflightStep:
        expected, step = self._inflight.popitem(last=False)
        if expected != step_id:
            raise IntegrityError(f"step {step_id} came back before step {expected}")
        self.kv.retire_step(step_id, failed_swap_outs=step.output.swap_outs if failed or step.void else ())
        return step

    def check_integrity(self) -> None:
        """Raise IntegrityError unless blocks and queues are consistent."""
        self.kv.check_integrity(self.requests.values())
        if sorted(self.running, key=self.policy.key) != self.running:
            raise IntegrityError("running requests are out of order")
        for request in self.requests.values():
            running = request.status is RequestStatus.RUNNING
            if running != (request in self.running) or running != bool(request.block_ids):
                raise IntegrityError(f"{request!r} holds {len(request.block_ids)} blocks in the wrong state")
            if not 0 <= request.num_retired_tokens <= request.num_computed_tokens:
                raise IntegrityError(f"{request!r} has {request.num_retired_tokens} tokens retired")
            if request.num_pending < 0 or request.num_inflight < 0:
                raise IntegrityError(f"{request!r} got more results than it has steps")
