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
import itertools
from collections import OrderedDict

from penstock.core.errors import IntegrityError
from penstock.core.types import FinishReason, LiveLimits
from penstock.engine.kv_cache_manager import KVCacheManager
from penstock.engine.plan import InflightStep, StepPart, StepPlan, Update
from penstock.engine.policy import Policy, Room
from penstock.engine.request import Request, RequestStatus
from penstock.engine.step import CachedRequest, NewRequest, RequestKey, RunnerOutput, SchedulerOutput

# One waiting request may displace as many as it needs; the others of a step only so many together.
MAX_DISPLACED_PER_STEP = 8


class Scheduler:
    """Requests in, steps out; results in, updates out. Single-threaded.

    `ceiling`: the start-up values of the live limits. Call `schedule` and hand its steps to an executor; call `update` (or `fail`) once
    for every step, in order.
    """

    def __init__(self, kv: KVCacheManager, policy: Policy, ceiling: LiveLimits) -> None:
        self.kv = kv
        self.policy = policy
        self.limits = ceiling
        self.requests: dict[RequestKey, Request] = {}
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._inflight: OrderedDict[int, InflightStep] = OrderedDict()
        self._next_step_id = 0
        self._finished_keys: list[RequestKey] = []
        self._preempted_keys: list[RequestKey] = []
        self._suspects: list[Request] = []

    # ---- requests come and go ----

    def add(self, request: Request) -> None:
        """Queue a request; with a leader it waits until the leader has computed the prompt that they share."""
        self.requests[request.key] = request
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
        plan = StepPlan(self._token_budget, self._token_budget)
        if self._suspects:
            self._schedule_suspect(plan)
        else:
            self._schedule_running(plan)
            self._schedule_waiting(plan)
        return self._commit(plan) if plan.scheduled else None

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
        if len(decoding) > plan.budget:
            decoding = self.policy.arrange(decoding)
        for request in decoding:
            self._extend(plan, request, 1)
        cap = self.limits.max_prefill_tokens_while_decoding
        if plan.scheduled and cap is not None:
            plan.prefill_budget = min(plan.budget, cap)
        plan.prompts = self.policy.arrange([request for request, num_wanted in wanted.items() if num_wanted > 1])
        for request in plan.prompts[:]:
            self._schedule_waiting(plan, before=request)
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

    def _schedule_waiting(self, plan: StepPlan, before: Request | None = None) -> None:
        """Admit waiting requests in the policy's order; with `before`, only those whose turn is before that running one's."""
        while plan.budget > 0 and not plan.outgrown and self._admit_next(plan, before):
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
        """Preempt those that the policy lets `request` displace, if that gives it a place and all the blocks it needs. `only_place`: it is
        not first in line, and blocks that come back later with steps in flight would go to who is."""
        room = Room(self._max_num_seqs, self._token_budget, self.kv.pool.num_blocks)
        victims = self.policy.displaceable(request, self.kv.blocks_for(request.num_tokens), self.running, room)
        first = next(victims, None)
        if first is None or self.kv.has_copies:
            return False
        missing_blocks = self._missing_blocks(plan, request)
        if missing_blocks is None or (only_place and missing_blocks > 0):
            return False
        missing_blocks -= self.kv.num_deferred
        missing_slots = len(self.running) + 1 - self._max_num_seqs
        chosen = []
        for victim in itertools.chain([first], victims):
            if missing_slots <= 0 and missing_blocks <= 0:
                break
            if not victim.known_to_runner:
                return False  # admitted in this very step
            chosen.append(victim)
            missing_slots -= 1
            missing_blocks -= self.kv.num_exclusive(victim)
        enough = missing_slots <= 0 and missing_blocks <= 0
        if not enough or (plan.num_displaced and plan.num_displaced + len(chosen) > MAX_DISPLACED_PER_STEP):
            return False
        for victim in chosen:
            self._preempt(plan, victim)
        plan.num_displaced += len(chosen)
        return bool(chosen)

    def _missing_blocks(self, plan: StepPlan, request: Request) -> int | None:
        """How many blocks more must be free before the request can be admitted; None when this step has no tokens for it anyway."""
        if self._may_fork(request):
            return 1 + self._promised_blocks(plan) - self.kv.pool.num_free if plan.share_of(1) > 0 else None
        match = self.kv.match_prefix(request)
        if plan.share_of(request.num_tokens - match.num_tokens) <= 0:
            return None
        return self.kv.missing(request, match, request.num_tokens) + self._promised_blocks(plan)

    def _promised_blocks(self, plan: StepPlan) -> int:
        running = (request for request in plan.prompts if request.status is RequestStatus.RUNNING)
        return sum(max(0, self.kv.blocks_for(request.num_tokens) - len(request.block_ids)) for request in running)

    @staticmethod
    def _may_fork(request: Request) -> bool:
        leader = request.leader
        if leader is None or not leader.block_ids:
            return False
        return leader.num_computed_tokens >= request.num_prompt_tokens > 1

    def _admit(self, plan: StepPlan, request: Request) -> bool:
        """Move a waiting request to running and schedule its first tokens. False when budget or blocks are short."""
        if request.leader is not None and self._may_fork(request):
            return self._admit_fork(plan, request, request.leader)
        match = self.kv.match_prefix(request)
        request.num_computed_tokens = match.num_tokens
        num_tokens = plan.share_of(request.num_uncomputed_tokens)
        # A prompt that is admitted piece by piece must fit as a whole, or several would grow into each other.
        if num_tokens <= 0 or self.kv.missing(request, match, request.num_tokens) + self._promised_blocks(plan) > 0:
            request.num_computed_tokens = 0
            return False
        self.kv.admit(request, match, match.num_tokens + num_tokens)
        self._start(plan, request, num_tokens, match.num_tokens)
        return True

    def _admit_fork(self, plan: StepPlan, request: Request, leader: Request) -> bool:
        if self.kv.pool.num_free <= self._promised_blocks(plan):
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
        # Stable: those that need one token first.
        for request, num_tokens in sorted(plan.scheduled.items(), key=lambda item: item[1] > 1):
            step.num_scheduled_tokens[request.key] = num_tokens
            if request.known_to_runner:
                step.cached_requests.append(
                    CachedRequest(request.key, plan.new_blocks[request], request.num_computed_tokens)
                )
            else:
                step.new_requests.append(_new_request(request))
                request.known_to_runner = True
            request.num_computed_tokens += num_tokens
            request.num_inflight += 1
            request.last_step_id = step.step_id
            samples = request.num_computed_tokens == request.num_tokens + request.num_pending
            request.num_pending += samples
            parts.append(StepPart(request, num_tokens, request.epoch, samples))
            if request.followers and request.num_computed_tokens >= request.num_prompt_tokens:
                self._release_followers(request)
        self._inflight[step.step_id] = InflightStep(step, parts)
        return step

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
                self._keep_prompt_logprobs(request, output)
            is_current = part.epoch == request.epoch
            if is_current:
                request.num_retired_tokens += part.num_tokens
                if self._suspects and part.samples and request in self._suspects:
                    self._suspects.remove(request)
            if part.samples:
                updates.append(self._append(request, output))
            if is_current and not request.finished:
                self.kv.cache_computed_blocks(request)
        return updates

    def _append(self, request: Request, output: RunnerOutput) -> Update:
        """Append sampled tokens up to the first that ends the request."""
        sampled = output.sampled_token_ids.get(request.key)
        if not sampled:
            raise IntegrityError(f"step {output.step_id} has no token for {request!r}")
        offset = num_output = request.num_output_tokens
        taken: list[int] = []
        finish_reason: FinishReason | None = None
        stop_token_id = None
        if request.max_output_tokens == 0:
            finish_reason = "length"
        else:
            for token_id in sampled:
                request.token_ids.append(token_id)
                taken.append(token_id)
                num_output += 1
                if token_id in request.stop_token_ids and num_output > request.sampling.min_tokens:
                    finish_reason, stop_token_id = "stop", token_id
                elif num_output >= request.max_output_tokens:
                    finish_reason = "length"
                if finish_reason is not None:
                    break
        if finish_reason is not None:
            # The blocks of a finished request are the likeliest to be asked for again: name them first.
            if request.block_ids:
                self.kv.cache_computed_blocks(request)
            self.finish(request)
        logprobs = output.logprobs.get(request.key)
        return Update(
            request, offset, taken, logprobs[: len(taken)] if logprobs else None, finish_reason, stop_token_id
        )

    def _keep_prompt_logprobs(self, request: Request, output: RunnerOutput) -> None:
        entry = output.prompt_logprobs.get(request.key)
        if entry is None or request.prompt_logprobs is None:
            return
        start, entries = entry
        # With several steps in flight a preempted request may be told an entry twice.
        request.prompt_logprobs.extend(entries[request.next_prompt_logprob - start :])

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
            if request.num_pending < 0 or request.num_inflight < 0:
                raise IntegrityError(f"{request!r} got more results than it has steps")


def _new_request(request: Request) -> NewRequest:
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
