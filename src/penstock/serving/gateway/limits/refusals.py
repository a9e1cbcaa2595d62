"""Remembers whose requests of the minute are used up, so that those who come again at once are refused without asking the store.

Only requests per minute can be remembered: nothing but time frees such a window, while slots and tokens come back when requests end.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from penstock.serving.gateway.limits.interface import Subject, Verdict, Window

MAX_KEPT = 4096

# Whose: tenant, and its and the key's limits, so that a limit that was raised is asked for again.
Who = tuple[str, tuple[Subject, ...]]


@dataclass(frozen=True, slots=True)
class _Refusal:
    verdict: Verdict
    asked_at: float


class KnownRefusals:
    """The last refusals of at most MAX_KEPT keys. Times are the limiter's clock."""

    def __init__(self) -> None:
        self._refusals: OrderedDict[Who, _Refusal] = OrderedDict()

    def note(self, who: Who, verdict: Verdict, asked_at: float) -> None:
        """Remember a verdict that only time can change. `asked_at`: before the store was asked, so that the memory never outlasts the
        window."""
        if verdict.refused_by == "requests":
            self._refusals[who] = _Refusal(verdict, asked_at)
            self._refusals.move_to_end(who)
            if len(self._refusals) > MAX_KEPT:
                self._refusals.popitem(last=False)

    def find(self, who: Who, now: float) -> Verdict | None:
        """The verdict that the store would give now, as far as requests go; None when it has to be asked."""
        refusal = self._refusals.get(who)
        if refusal is None:
            return None
        verdict, passed_s = refusal.verdict, now - refusal.asked_at
        if passed_s >= verdict.retry_after_s:
            del self._refusals[who]
            return None
        return Verdict(
            False,
            "requests",
            verdict.subject,
            verdict.retry_after_s - passed_s,
            _later(verdict.requests, passed_s),
            _later(verdict.tokens, passed_s),
        )


def _later(window: Window | None, passed_s: float) -> Window | None:
    return None if window is None else Window(window.limit, window.remaining, max(0.0, window.reset_s - passed_s))
