"""Limits counted in this process: one gateway, the coordinator's share of several, or the stand-in while Redis is away.

A window is a log of admissions, each with the time at which it leaves. The log is exact while it is short; the admissions of a
crowded window share sub-buckets, which leave when the youngest of them would have: later than need be, never earlier.

    ├ exact: one entry per admission, leaves after WINDOW ┤├ crowded: one entry per sub-bucket, leaves after up to WINDOW + WINDOW/240 ┤

So a limit of N admits at most N in every half-open interval of one window, and up to EXACT_ENTRIES requests per minute are counted to
the microsecond. redis_store does the same in Lua.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable

from penstock.serving.gateway.limits.interface import (
    LEASE_S,
    WINDOW_S,
    LimitKind,
    Reservation,
    Subject,
    Verdict,
    Window,
)

# Entries of a window that are kept apart.
EXACT_ENTRIES = 1000
# Sub-buckets of a window into which further admissions go.
SUB_BUCKETS = 240
# A request that has nothing to settle is remembered so long, for a repetition of its admission.
REPEAT_S = 10.0
MICROSECONDS = 1_000_000


class LocalLimitStore:
    """LimitStore in memory. Used from one thread; every operation is one step of it.

    What is kept: an entry per admission of the last window, at most EXACT_ENTRIES + SUB_BUCKETS + 1 per limit; a record per request that is
    not settled. Every admission looks at a few old ones and drops those that time has emptied, so that idle subjects go and active
    ones stay. Times inside are whole microseconds.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        window_s: float = WINDOW_S,
        lease_s: float = LEASE_S,
        exact_entries: int = EXACT_ENTRIES,
    ) -> None:
        self._clock = clock
        self._window = round(window_s * MICROSECONDS)
        self._bucket = max(1, self._window // SUB_BUCKETS)
        self._lease = round(lease_s * MICROSECONDS)
        self._exact_entries = exact_entries
        self._states: OrderedDict[tuple[str, str], _SubjectState] = OrderedDict()
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def knows(self, request_id: str) -> bool:
        """Whether the request was admitted here and waits for its settlement."""
        return request_id in self._records

    def __len__(self) -> int:
        """Subjects and requests that are remembered."""
        return len(self._states) + len(self._records)

    async def admit(self, reservation: Reservation) -> Verdict:
        now = self._now()
        self._forget_idle(now, 1 + len(reservation.subjects))
        pairs = [(subject, self._state(reservation.tenant, subject, now)) for subject in reservation.subjects]
        if reservation.request_id not in self._records:
            refusal = self._refusal(pairs, reservation.tokens, now)
            if refusal is not None:
                wait, kind, name = refusal
                return Verdict(False, kind, name, wait / MICROSECONDS, *_tightest(pairs, now))
            self._charge(reservation, pairs, now)
        return Verdict(True, None, "", 0.0, *_tightest(pairs, now))

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        now = self._now()
        record = self._records.pop(reservation.request_id, None)
        if record is not None:
            for window, entry in record.charges:
                window.amend(entry, tokens - record.tokens, now)
        for subject in reservation.subjects:
            state = self._states.get((reservation.tenant, subject.name))
            if state is not None:
                state.slots.pop(reservation.request_id, None)

    async def renew(self, reservations: list[Reservation]) -> None:
        now = self._now()
        until = now + self._lease
        for reservation in reservations:
            record = self._records.get(reservation.request_id)
            if record is not None:
                record.kept_until = max(record.kept_until, until)
            for subject in reservation.subjects:
                if subject.concurrency is not None:
                    self._keep(reservation.tenant, subject, now).take_slot(reservation.request_id, until)

    async def close(self) -> None:
        """Nothing to release."""

    def _now(self) -> int:
        return round(self._clock() * MICROSECONDS)

    def _state(self, tenant: str, subject: Subject, now: int) -> _SubjectState:
        """The present state; of a subject that is not known an empty one, which is kept only when something is charged to it."""
        state = self._states.get((tenant, subject.name)) or _SubjectState()
        state.expire(now)
        return state

    def _keep(self, tenant: str, subject: Subject, now: int) -> _SubjectState:
        return self._states.setdefault((tenant, subject.name), self._state(tenant, subject, now))

    def _refusal(
        self, pairs: list[tuple[Subject, _SubjectState]], tokens: int, now: int
    ) -> tuple[int, LimitKind, str] | None:
        """The limit with the longest wait among those that are in the way, None when there is none."""
        worst: tuple[int, LimitKind, str] | None = None
        for subject, state in pairs:
            if subject.concurrency is not None and len(state.slots) >= subject.concurrency:
                worst = worst or (0, "concurrency", subject.name)
            if subject.requests_per_minute is not None:
                wait = self._wait(state.requests, 1, subject.requests_per_minute, now)
                if wait and (worst is None or wait > worst[0]):
                    worst = (wait, "requests", subject.name)
            if subject.tokens_per_minute is not None and tokens:
                wait = self._wait(state.tokens, tokens, subject.tokens_per_minute, now)
                if wait and (worst is None or wait > worst[0]):
                    worst = (wait, "tokens", subject.name)
        return worst

    def _wait(self, window: _Window, amount: int, limit: int, now: int) -> int:
        """Microseconds until `amount` fits, 0 when it does now."""
        excess = window.total + amount - limit
        if excess <= 0:
            return 0
        for entry in window.entries:
            excess -= entry.amount
            if excess <= 0:
                return entry.leaves_at - now
        return self._window  # above the limit even of an empty window; the limiter does not ask for that

    def _charge(self, reservation: Reservation, pairs: list[tuple[Subject, _SubjectState]], now: int) -> None:
        charges: list[tuple[_Window, _Entry]] = []
        has_slot = False
        for subject, state in pairs:
            self._states[reservation.tenant, subject.name] = state
            if subject.requests_per_minute is not None:
                self._add(state.requests, 1, now)
            if subject.tokens_per_minute is not None:
                charges.append((state.tokens, self._add(state.tokens, reservation.tokens, now)))
            if subject.concurrency is not None:
                has_slot = True
                state.take_slot(reservation.request_id, now + self._lease)
        kept_until = now + round(REPEAT_S * MICROSECONDS)
        if charges:
            kept_until = max(kept_until, now + self._window + self._bucket)
        if has_slot:
            kept_until = max(kept_until, now + self._lease)
        self._records[reservation.request_id] = _Record(reservation.tokens, charges, kept_until)

    def _add(self, window: _Window, amount: int, now: int) -> _Entry:
        leaves_at = now + self._window
        entries = window.entries
        if len(entries) >= self._exact_entries:
            leaves_at = -(-leaves_at // self._bucket) * self._bucket
        window.total += amount
        # Entries leave in the order in which they came; an exact one after sub-buckets joins the last.
        if entries and entries[-1].leaves_at >= leaves_at:
            entries[-1].amount += amount
        else:
            entries.append(_Entry(leaves_at, amount))
        return entries[-1]

    def _forget_idle(self, now: int, count: int) -> None:
        """Look at `count` subjects and records, one more than come in with an admission, and go round: so what is idle is found."""
        for _ in range(min(count, len(self._states))):
            key, state = self._states.popitem(last=False)
            state.expire(now)
            if state.requests.entries or state.tokens.entries or state.slots:
                self._states[key] = state
        for _ in range(min(2, len(self._records))):
            request_id, record = self._records.popitem(last=False)
            if record.kept_until > now:
                self._records[request_id] = record


class _Entry:
    """What was admitted at one time."""

    __slots__ = ("amount", "leaves_at")

    def __init__(self, leaves_at: int, amount: int) -> None:
        self.leaves_at = leaves_at
        self.amount = amount


class _Window:
    """Admissions of the last window, in the order in which they leave. `total`: the sum of their amounts."""

    __slots__ = ("entries", "total")

    def __init__(self) -> None:
        self.entries: deque[_Entry] = deque()
        self.total = 0

    def expire(self, now: int) -> None:
        entries = self.entries
        while entries and entries[0].leaves_at <= now:
            self.total -= entries.popleft().amount

    def amend(self, entry: _Entry, difference: int, now: int) -> None:
        """Change an entry that may have left by now."""
        self.expire(now)
        if entry.leaves_at > now:
            entry.amount += difference
            self.total += difference

    def view(self, limit: int, now: int) -> Window:
        reset = self.entries[-1].leaves_at - now if self.entries else 0
        return Window(limit, max(0, limit - self.total), reset / MICROSECONDS)


class _SubjectState:
    """`slots`: request id → when its lease ends, the earliest first."""

    __slots__ = ("requests", "slots", "tokens")

    def __init__(self) -> None:
        self.requests = _Window()
        self.tokens = _Window()
        self.slots: dict[str, int] = {}

    def expire(self, now: int) -> None:
        self.requests.expire(now)
        self.tokens.expire(now)
        while self.slots:
            request_id, until = next(iter(self.slots.items()))
            if until > now:
                break
            del self.slots[request_id]

    def take_slot(self, request_id: str, until: int) -> None:
        # All leases are equally long, so the youngest ends last.
        self.slots.pop(request_id, None)
        self.slots[request_id] = until


class _Record:
    """An admitted request that is not settled: what it reserved, where, and how long that is remembered."""

    __slots__ = ("charges", "kept_until", "tokens")

    def __init__(self, tokens: int, charges: list[tuple[_Window, _Entry]], kept_until: int) -> None:
        self.tokens = tokens
        self.charges = charges
        self.kept_until = kept_until


def _tightest(pairs: list[tuple[Subject, _SubjectState]], now: int) -> tuple[Window | None, Window | None]:
    """The requests and the tokens window with the least left."""
    requests: Window | None = None
    tokens: Window | None = None
    for subject, state in pairs:
        if subject.requests_per_minute is not None:
            requests = _tighter(requests, state.requests.view(subject.requests_per_minute, now))
        if subject.tokens_per_minute is not None:
            tokens = _tighter(tokens, state.tokens.view(subject.tokens_per_minute, now))
    return requests, tokens


def _tighter(one: Window | None, other: Window) -> Window:
    return other if one is None or other.remaining < one.remaining else one
