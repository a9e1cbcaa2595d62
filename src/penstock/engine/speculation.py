"""How many draft tokens each request should have verified at once.

What speculation gains depends on everything at once: how steps grow with their tokens, what proposals cost beside them, how often drafts
are right, how many requests share a step. None of that is modelled here; it is measured where it counts. For each size of the batch (1, 2,
4, then two sizes to a doubling) there are a few lengths to choose from, none at all being one of them, and for each the tokens per
second and request that it was seen to give:

    requests   0 drafts   2       4       8
    1          1,430      1,590   1,730   1,610      → 4
    7, 8         910        820     790     –        → none

Steps are counted in windows of one length. The best length is used; another one has a window now and then, the more rarely the more it
lost: all trials of the second best one cost about half a percent of the time, of every other one a fifth. A new size begins without drafts;
what lost in a smaller batch waits for its turn there as well.

Within a length, a request gets drafts as far as they are likely to be right, by its own running acceptance (acceptance.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.engine.acceptance import Acceptances
from penstock.engine.executor import SpeculationProfile
from penstock.engine.step import RequestKey

# Steps of a window that count, behind those in which the last window's drafts are still verified; a first window is longer.
_WINDOW, _FIRST_WINDOW, _SETTLING = 6, 8, 2
# Part of the time that trials of the second best length, and of each other one, may cost.
_SECOND_SHARE, _TRIAL_SHARE = 0.005, 0.002
# What a window leaves of the weight of one before it, whatever its length was; of those long ago, this much is kept at least.
_KEEP, _KEEP_OF_OLD = 0.9, 0.2
# By how much a length has to be better than the one in use.
_LEAD = 0.02
# Lengths that lose this much are not better for being longer.
_CLEAR_LOSS = 0.05
# Windows that give less than this part of what their length gave before: after so many, all lengths are tried again, and what is known of
# them counts only this much.
_BAD, _BAD_WINDOWS, _FORGET = 0.6, 3, 0.2
# A request without drafts gets a single one in so many plans, to see whether it has become predictable.
_PROBE_INTERVAL = 48


@dataclass
class _Arm:
    """A length, and what it gave lately. ended: the batch's time at the end of its last window, which was the batch's window `last`; cost:
    seconds that were lost by it. wait: windows before it is tried first."""

    length: int
    tokens: float = 0.0
    seconds: float = 0.0
    ended: float = 0.0
    last: int = 0
    cost: float = 0.0
    wait: float = 0.0

    @property
    def tried(self) -> bool:
        return self.seconds > 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass
class _Batch:
    """What is known of batches of about one size. arm: the length in use; its window has `steps` to go behind `settling` ones that do not
    count, and has given `tokens` in `seconds` so far. best: the length that gave most. time: seconds of all windows. bad_windows: so many
    in a row gave far less than their length did before."""

    arms: list[_Arm]
    arm: _Arm
    best: _Arm
    settling: int = 0
    steps: int = _FIRST_WINDOW
    tokens: float = 0.0
    seconds: float = 0.0
    time: float = 0.0
    windows: int = 0
    bad_windows: int = 0


class SpeculationController:
    """Chooses draft lengths from what was accepted so far and from what steps gave. Single-threaded."""

    def __init__(self, profile: SpeculationProfile) -> None:
        self.profile = profile
        self._acceptances = Acceptances()
        self._batches: dict[int, _Batch] = {}
        self._batch: _Batch | None = None
        # Whether the last step counts, and a request's share of it.
        self._counts, self._share = False, 1.0
        self._plans = 0

    def rests(self, num_requests: int) -> bool:
        """Whether a step of so many requests has no drafts, so that nothing need be planned for it. Asked once for each step."""
        if not self.profile.adaptive:
            return False
        return self._enter(num_requests).arm.length == 0

    def plan(self, keys: Sequence[RequestKey], num_others: int) -> list[int]:
        """How many drafts to propose for each of these requests, which sample in the step that is being made and will all be in the next
        one; `num_others` requests that cannot have drafts will be in it as well, with a token each. `rests` was asked before."""
        if not self.profile.adaptive:
            return [self.profile.max_draft_tokens] * len(keys)
        length = self._enter(len(keys) + num_others).arm.length
        if not length:
            return [0] * len(keys)
        self._plans += 1
        lengths = []
        for key in keys:
            record = self._acceptances.record(key)
            likely = min(length, record.longest)
            if not likely and self._plans - record.last_probe >= _PROBE_INTERVAL:
                likely, record.last_probe = 1, self._plans
            lengths.append(likely)
        return lengths

    def verified(self, key: RequestKey, num_drafts: int, num_accepted: int) -> None:
        """A step has verified drafts of a request."""
        if not self.profile.adaptive or num_drafts < 1:
            return
        self._acceptances.verified(key, num_drafts, num_accepted)
        if self._counts and self._batch is not None:
            self._batch.tokens += num_accepted * self._share

    def step_done(self, num_requests: int, num_prompt_tokens: int, seconds: float, draft_seconds: float) -> None:
        """A step in which `num_requests` were took `seconds`, scheduling and delivery included, and `draft_seconds` of them for proposals;
        what it verified is told next. Of a step with prompts only the latter counts: a draft model has to compute prompts as well."""
        self._counts = False
        batch = self._batch
        if batch is None or seconds <= 0.0:
            return
        if num_prompt_tokens:
            batch.seconds += draft_seconds
        elif batch.settling:
            batch.settling -= 1
        elif batch.steps:
            self._counts = True
            batch.steps -= 1
            batch.tokens += 1.0
            batch.seconds += seconds
            self._share = 1.0 / num_requests

    def forget(self, key: RequestKey) -> None:
        """The request has ended."""
        self._acceptances.forget(key)

    def _enter(self, num_requests: int) -> _Batch:
        """The batch of this size, with the length that its next step has."""
        size = _size(num_requests)
        batch = self._batches.get(size)
        if batch is None:
            batch = self._batches[size] = self._new_batch(size)
        if batch is not self._batch:
            batch.settling = _SETTLING
            self._counts = False
            self._batch = batch
        if not batch.steps:
            _finish_window(batch)
        return batch

    def _new_batch(self, size: int) -> _Batch:
        most = self.profile.max_draft_tokens
        arms = [_Arm(length) for length in sorted({0, 1, min(2, most), min(4, most), most})]
        known = [other for other, batch in self._batches.items() if batch.best.tried]
        if not known:
            return _Batch(arms, arms[0], arms[0])
        place = min(known, key=lambda other: abs(other - size))
        nearest = self._batches[place]
        for arm, other in zip(arms[1:], nearest.arms[1:], strict=True):
            # What loses in a smaller batch loses more in a larger one, but may gain in one that is smaller still.
            loss = 1.0 - other.rate / nearest.best.rate if other.tried else 1.0
            arm.wait = loss / _TRIAL_SHARE if place < size else 0.0
        return _Batch(arms, arms[0], arms[0])


def _size(num_requests: int) -> int:
    """A number for batches of about as many requests: each count up to 4 has its own, then there are two to a doubling."""
    power = max((num_requests - 1).bit_length() - 2, 0)
    return 2 * power + (num_requests - 1 >> power)


def _finish_window(batch: _Batch) -> None:
    """Take in what the window gave, and begin the next one."""
    arm = batch.arm
    batch.bad_windows = batch.bad_windows + 1 if _is_bad_window(batch) else 0
    if batch.bad_windows == _BAD_WINDOWS:
        # Requests have changed: what is known of all lengths is old.
        for some in batch.arms:
            some.tokens, some.seconds, some.cost = _FORGET * some.tokens, _FORGET * some.seconds, 0.0
    batch.time += batch.seconds
    batch.windows += 1
    kept = max(_KEEP ** (batch.windows - arm.last), _KEEP_OF_OLD)
    arm.tokens = kept * arm.tokens + batch.tokens
    arm.seconds = kept * arm.seconds + batch.seconds
    arm.ended, arm.last = batch.time, batch.windows
    tried = [some for some in batch.arms if some.tried]
    leader = max(tried, key=lambda some: some.rate)
    if not batch.best.tried or leader.rate > batch.best.rate * (1.0 + _LEAD):
        batch.best = leader
    loss = max(1.0 - arm.rate / batch.best.rate, 0.02)
    arm.cost = batch.seconds * loss
    chosen = _next_arm(batch)
    batch.steps = _WINDOW if chosen.tried else _FIRST_WINDOW
    batch.settling = 0 if chosen is arm else _SETTLING
    batch.tokens = batch.seconds = 0.0
    batch.arm = chosen


def _is_bad_window(batch: _Batch) -> bool:
    return batch.arm.tried and batch.tokens < _BAD * batch.arm.rate * batch.seconds


def _next_arm(batch: _Batch) -> _Arm:
    """A length that was not tried yet, one whose turn it is, or the best one."""
    untried = [arm for arm in batch.arms if not arm.tried and arm.wait <= batch.windows]
    if untried and not _is_hopeless(batch):
        # Single drafts pay least for what all proposals cost.
        return min(untried, key=lambda arm: (arm.wait, arm.length == 1))
    others = sorted((arm for arm in batch.arms if arm is not batch.best and arm.tried), key=lambda arm: -arm.rate)
    for place, arm in enumerate(others):
        if arm.cost <= (batch.time - arm.ended) * (_TRIAL_SHARE if place else _SECOND_SHARE):
            return arm
    return batch.best


def _is_hopeless(batch: _Batch) -> bool:
    """Whether the two lengths that are tried first lose clearly, and the longer one is hardly better: then others lose as well."""
    tried = [arm for arm in batch.arms if arm.tried]
    if len(tried) != 3 or tried[0].length:
        return False
    bound = tried[0].rate * (1.0 - _CLEAR_LOSS)
    return tried[1].rate < bound and tried[2].rate < min(bound, tried[1].rate * (1.0 + 2 * _CLEAR_LOSS))
