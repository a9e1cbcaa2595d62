"""Room for one more: how many blocks an admission lacks, and which running requests would have to make way.

Nothing is changed here; the scheduler preempts whom `choose_victims` names. The order in which requests may displace others is the
policy's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from penstock.engine.kv_cache_manager import KVCacheManager
from penstock.engine.plan import StepPlan
from penstock.engine.policy import Policy, Room
from penstock.engine.request import Request, RequestStatus

# One waiting request may displace as many as it needs; the others of a step only so many together.
MAX_DISPLACED_PER_STEP = 8


def promised_blocks(kv: KVCacheManager, plan: StepPlan) -> int:
    """Blocks that running prompts do not have yet; they were admitted because these were free."""
    running = (request for request in plan.prompts if request.status is RequestStatus.RUNNING)
    return sum(max(0, kv.blocks_for(request.num_tokens) - len(request.block_ids)) for request in running)


def may_fork(request: Request) -> bool:
    """Whether the request can share the blocks of its leader's prompt."""
    leader = request.leader
    if leader is None or not leader.block_ids:
        return False
    return leader.num_computed_tokens >= request.num_prompt_tokens > 1


def missing_blocks(kv: KVCacheManager, plan: StepPlan, request: Request) -> int | None:
    """How many blocks more must be free before the request can be admitted; None when this step has no tokens for it anyway."""
    if may_fork(request):
        return 1 + promised_blocks(kv, plan) - kv.pool.num_free if plan.share_of(1) > 0 else None
    match = kv.match_prefix(request)
    if plan.share_of(request.num_tokens - match.num_tokens) <= 0:
        return None
    return kv.missing(request, match, request.num_tokens) + promised_blocks(kv, plan)


def choose_victims(
    kv: KVCacheManager,
    policy: Policy,
    plan: StepPlan,
    request: Request,
    running: Sequence[Request],
    room: Room,
    *,
    only_place: bool,
) -> list[Request]:
    """Those that the policy lets `request` displace, if that gives it a place and all the blocks it needs; else nobody. `only_place`: it is
    not first in line, and blocks that come back later with steps in flight would go to who is."""
    victims = policy.displaceable(request, kv.blocks_for(request.num_tokens), running, room)
    first = next(victims, None)
    if first is None or kv.has_copies:
        return []
    num_blocks = missing_blocks(kv, plan, request)
    if num_blocks is None or (only_place and num_blocks > 0):
        return []
    num_blocks -= kv.num_deferred
    num_places = len(running) + 1 - room.slots
    chosen: list[Request] = []
    for victim in itertools.chain([first], victims):
        if num_places <= 0 and num_blocks <= 0:
            break
        if not victim.known_to_runner:
            return []  # admitted in this very step
        chosen.append(victim)
        num_places -= 1
        num_blocks -= kv.num_exclusive(victim)
    enough = num_places <= 0 and num_blocks <= 0
    if not enough or (plan.num_displaced and plan.num_displaced + len(chosen) > MAX_DISPLACED_PER_STEP):
        return []
    return chosen
