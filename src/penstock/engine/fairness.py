"""Weighted fair shares between tenants: virtual time decides who comes first, dominant shares decide who makes room.

Each tenant has a clock of its own, its virtual time: tokens computed for it (prompt and output, each once) divided by its weight. The
tenant with the least is next, be it for a place or for the prompt tokens of a step (Demers, Keshav and Shenker 1989; for tokens of
language models: Sheng et al., "Fairness in Serving Large Language Models", 2024). In the long run tenants that always want more get
service in proportion to their weights, and a tenant that wants little is always first.

Nobody saves up: a tenant that begins to wait starts at the least virtual time among those that wait already, or at its own if that is
more. Its own is remembered without requests too, until the others have caught up (MAX_DEBTS at most).

    virtual time ──▶  … ──●─────────●───────────────●──
                      waiting a   waiting b      waiting c
                          ▲ a newcomer starts here and, on a tie, is served before a

A stream of newcomers could so keep `a` from ever being served. Therefore they start at least at the fair clock, less HEAD_START: the
service of all divided by the weights of all, where a tenant that got exactly its share would be.

Virtual time evens things out over seconds; a tenant's first token cannot wait for others' requests to end. So a tenant may displace
running requests of another one that holds more than it does: what a tenant holds is the larger of its parts of places and of
KV blocks, divided by its weight (dominant shares, Ghodsi et al. 2011), and after the exchange it must hold no more than the other
one still does. Each exchange so lowers the largest share involved, none can be undone by another, and nobody loses the last that it has.
A tenant that is ahead of the other by more than a step's tokens of virtual time waits all the same.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence

from penstock.engine.policy import Room, SortKey, WaitingHeap, aged_key, more_urgent
from penstock.engine.request import Request, RequestStatus

WEIGHT_RANGE = (1e-3, 1e3)
# How far behind the fair clock, in tokens per weight, a newcomer may start.
HEAD_START = 512.0
MAX_DEBTS = 1024
# So many tenants are asked in each round whether they may displace somebody when the first of them may not.
MAX_HEADS = 4


class Tenant:
    """A tenant with requests in the engine. `in_heap`: the heap of waiting tenants has an entry."""

    __slots__ = ("in_heap", "num_requests", "virtual_time", "waiting", "weight")

    def __init__(self, virtual_time: float) -> None:
        self.weight = 0.0
        self.virtual_time = virtual_time
        self.num_requests = 0
        self.waiting = WaitingHeap()
        self.in_heap = False


class FairShares:
    """The policy 'fair'. With one tenant it is 'priority', and with one priority on top of that it is 'fcfs'."""

    def __init__(self) -> None:
        self._tenants: dict[str, Tenant] = {}
        self._debts: dict[str, float] = {}
        self._heap: list[tuple[float, int, Tenant]] = []
        self._entries = 0
        self._fair_clock = 0.0
        self._total_weight = 0.0

    def key(self, request: Request) -> SortKey:
        return aged_key(request)

    # ---- requests come and go ----

    def arrived(self, request: Request) -> None:
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = Tenant(self._debts.pop(request.tenant, 0.0))
        weight = _usable_weight(request.weight)
        self._total_weight += weight - tenant.weight
        tenant.weight = weight
        tenant.num_requests += 1

    def departed(self, request: Request) -> None:
        tenant = self._tenants[request.tenant]
        tenant.num_requests -= 1
        if tenant.num_requests == 0:
            self._forget(request.tenant)

    def _forget(self, name: str) -> None:
        gone = self._tenants.pop(name)
        if not self._tenants:
            self._debts.clear()
            self._total_weight = 0.0  # and with it what rounding has added up
            return
        self._total_weight -= gone.weight
        least = self._least()
        if least is not None and gone.virtual_time > least.virtual_time:
            self._debts[name] = gone.virtual_time
            if len(self._debts) > MAX_DEBTS:
                self._settle_debts(least.virtual_time)
        if len(self._heap) > 2 * len(self._tenants) + 64:
            self._sweep_heap()

    def _sweep_heap(self) -> None:
        """Drop the entries of those that do not wait; they may be anywhere below the top."""
        kept = []
        for entry in self._heap:
            tenant = entry[2]
            tenant.in_heap = len(tenant.waiting) > 0
            if tenant.in_heap:
                kept.append(entry)
        heapq.heapify(kept)
        self._heap = kept

    def _settle_debts(self, least: float) -> None:
        """Forget the debts that the others have caught up with; if that is not half of them, the oldest too."""
        open_debts = [(name, at) for name, at in self._debts.items() if at > least]
        self._debts = dict(open_debts[-MAX_DEBTS // 2 :])

    # ---- waiting ----

    def push(self, request: Request) -> None:
        tenant = self._tenants[request.tenant]
        if not len(tenant.waiting):
            tenant.virtual_time = max(tenant.virtual_time, self._start_time())
        request.status = RequestStatus.WAITING
        tenant.waiting.push(self.key(request), request)
        if not tenant.in_heap:
            tenant.in_heap = True
            self._entries += 1
            # Of equals the last to come is first: the others are being served.
            heapq.heappush(self._heap, (tenant.virtual_time, -self._entries, tenant))

    def _start_time(self) -> float:
        """Where the clock of a tenant starts that did not wait: even with the least served one that does. When nobody waits there is
        no contention, and whoever got more than others took nothing from them: even with the most served one."""
        least = self._least()
        start = max(tenant.virtual_time for tenant in self._tenants.values()) if least is None else least.virtual_time
        return max(start, self._fair_clock - HEAD_START)

    def discard(self, request: Request) -> None:
        self._tenants[request.tenant].waiting.discard(request)

    def heads(self) -> list[Request]:
        least = self._least()
        if least is None:
            return []
        heads: list[Request] = []
        entries: list[tuple[float, int, Tenant]] = []
        while least is not None and len(heads) < MAX_HEADS:
            first = least.waiting.first()
            if first is not None:
                heads.append(first)
            entries.append(heapq.heappop(self._heap))
            least = self._least()
        for entry in entries:
            heapq.heappush(self._heap, entry)
        return heads

    def num_waiting_of(self, tenant: str) -> int:
        known = self._tenants.get(tenant)
        return 0 if known is None else len(known.waiting)

    def _least(self) -> Tenant | None:
        """The waiting tenant with the least virtual time. Entries are brought up to date when they come to the top; clocks only go on, so
        no entry is too late there."""
        heap = self._heap
        while heap:
            virtual_time, tie, tenant = heap[0]
            if not len(tenant.waiting):
                heapq.heappop(heap)
                tenant.in_heap = False
            elif virtual_time != tenant.virtual_time:
                heapq.heapreplace(heap, (tenant.virtual_time, tie, tenant))
            else:
                return tenant
        return None

    # ---- tokens ----

    def arrange(self, running: list[Request]) -> list[Request]:
        tenants = self._tenants
        return running if len(tenants) == 1 else sorted(running, key=lambda r: tenants[r.tenant].virtual_time)

    def precedes(self, waiting: Request, running: Request) -> bool:
        if waiting.tenant == running.tenant:
            return more_urgent(waiting, running)
        return self._tenants[waiting.tenant].virtual_time <= self._tenants[running.tenant].virtual_time

    def charge(self, scheduled: Mapping[Request, int]) -> None:
        tenants, total = self._tenants, 0
        for request, num_tokens in scheduled.items():
            fresh = request.num_computed_tokens + num_tokens - request.num_charged_tokens
            if fresh > 0:
                request.num_charged_tokens += fresh
                tenant = tenants[request.tenant]
                tenant.virtual_time += fresh / tenant.weight
                total += fresh
        self._fair_clock += total / self._total_weight

    # ---- room ----

    def victim(self, running: Sequence[Request]) -> Request:
        """The last request of the tenant that holds most blocks for its weight, but never the first of all: it will end, and so does
        the shortage."""
        if len(self._tenants) == 1:
            return running[-1]
        blocks: dict[str, int] = {}
        last: dict[str, Request] = {}
        for request in running:
            blocks[request.tenant] = blocks.get(request.tenant, 0) + len(request.block_ids)
            last[request.tenant] = request
        candidates = [request for request in last.values() if request is not running[0]]
        if not candidates:
            return running[-1]
        return max(candidates, key=lambda request: blocks[request.tenant] / self._tenants[request.tenant].weight)

    def displaceable(
        self, request: Request, num_blocks: int, running: Sequence[Request], room: Room
    ) -> Iterator[Request]:
        """Less urgent requests of its own tenant first, then the latest of the tenants that hold most."""
        own = [other for other in running if other.tenant == request.tenant]
        yield from _less_urgent(request, own)
        if len(own) == len(running):
            return
        holdings = self._holdings(running, room)
        ours = self._tenants[request.tenant]
        wanted = holdings.pop(request.tenant, None) or _Holding(ours.weight, room)
        wanted_share = wanted.with_more(1, num_blocks)
        most_first = [(-holding.with_more(0, 0), number, holding) for number, holding in enumerate(holdings.values())]
        heapq.heapify(most_first)
        while most_first and -most_first[0][0] > wanted_share:
            _, number, holding = heapq.heappop(most_first)
            victim = holding.requests[-1]
            behind = ours.virtual_time <= self._tenants[victim.tenant].virtual_time + room.tokens
            if behind and wanted_share <= holding.with_more(-1, -len(victim.block_ids)):
                yield victim
                holding.drop_last()
                heapq.heappush(most_first, (-holding.with_more(0, 0), number, holding))

    def _holdings(self, running: Sequence[Request], room: Room) -> dict[str, _Holding]:
        holdings: dict[str, _Holding] = {}
        for request in running:
            holding = holdings.get(request.tenant)
            if holding is None:
                holding = holdings[request.tenant] = _Holding(self._tenants[request.tenant].weight, room)
            holding.requests.append(request)
            holding.blocks += len(request.block_ids)
        return holdings


class _Holding:
    """What a tenant holds: its running requests, in order, and their blocks."""

    __slots__ = ("_room", "_weight", "blocks", "requests")

    def __init__(self, weight: float, room: Room) -> None:
        self._weight = weight
        self._room = room
        self.requests: list[Request] = []
        self.blocks = 0

    def drop_last(self) -> None:
        self.blocks -= len(self.requests.pop().block_ids)

    def with_more(self, requests: int, blocks: int) -> float:
        """The tenant's share with so many more (or fewer) requests and blocks: the larger of its parts of both, for its weight."""
        slots = (len(self.requests) + requests) / self._room.slots
        return max(slots, (self.blocks + blocks) / self._room.blocks) / self._weight


def _less_urgent(request: Request, running: Sequence[Request]) -> Iterator[Request]:
    for other in reversed(running):
        if not more_urgent(request, other):
            return
        yield other


def _usable_weight(weight: float) -> float:
    """Within WEIGHT_RANGE; 1 for what is not a number."""
    low, high = WEIGHT_RANGE
    return 1.0 if math.isnan(weight) else min(max(weight, low), high)
