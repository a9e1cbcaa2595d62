"""How many draft tokens each request should have verified at once.

A step yields a token of each request in it and its accepted drafts, so that the rate of steady decoding is

    rate(k) = (requests + Σ_r h_r Σ_{i ≤ k_r} a_r^i) / (T(requests + Σ_r h_r k_r) + D(k))

with a_r the chance that a draft of request r is accepted (acceptance.py), h_r the chance that there is one, T the seconds of a step of so
many tokens and D those of proposing (step_costs.py). The best k of a given number of drafts has those with the largest a_r^i. So candidates
(r, i) are taken in this order, the rate is looked at after each, and the best one is kept, which may be none at all: a step that is bound
by arithmetic gains nothing from more tokens. Requests are taken together by their a in steps of 1 / NUM_LEVELS, which makes the order a
table that is made once, and planning cheap.

What is not tried is not learned, so now and then a request without drafts gets one. Such trials are paid from an allowance, a small share
of the time of the steps; failed ones make the next ones rarer, and none are made while even perfect drafts would not pay. The other way
round, drafts pause for two steps every now and then, so that the cost of steps without them stays known.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.engine.acceptance import Acceptances, Record
from penstock.engine.executor import SpeculationProfile
from penstock.engine.step import RequestKey
from penstock.engine.step_costs import ProposalCosts, StepCosts

NUM_LEVELS = 48
# By how much the rate has to grow for drafts to begin, and to go on.
_GAIN_TO_BEGIN, _GAIN_TO_GO_ON = 0.03, 0.01
# Part of the steps' time for trials, what a trial is taken to cost at least, and how much rarer failures make them.
_TRIAL_SHARE, _LEAST_TRIAL_COST, _MOST_PATIENCE = 0.0075, 0.01, 4.0
# Plans with drafts from one pause to the next: at most and at least, and in between so many that pauses cost this part of what is gained.
_PAUSE_INTERVALS, _PAUSE_SHARE = (20, 300), 0.004
# Plans for which drafts are stayed with once they have begun: what they cost shows when they are no exception.
_LEAST_PLANS = 16
# Drafts that are accepted less often than this are not looked at.
_LEAST_CHANCE = 0.03
# Plans that use the same choice, and choices from one that looks at all depths to the next.
_PLANS_PER_CHOICE, _CHOICES_PER_SEARCH = 8, 8
# Plans until proposals for a request cost what they will cost from then on.
_PLANS_TO_SETTLE = 2
# Up to so many requests each of them decides.
_FEW_REQUESTS = 4
# Plans that are not made after one without drafts: where even perfect drafts would not pay, and elsewhere.
_LONG_REST, _SHORT_REST = 15, 3

_CHANCES = [(level + 0.5) / NUM_LEVELS for level in range(NUM_LEVELS)]
_LOG_CHANCES = [math.log(chance) for chance in _CHANCES]


@dataclass(frozen=True, slots=True)
class _Choice:
    """All candidates (level, i) with i up to `depth` and a chance of at least `least_chance`, and one draft more for `extra_count` requests
    of `extra_level`. rate: tokens per second with them."""

    rate: float
    depth: int = 0
    least_chance: float = 1.0
    extra_level: int = -1
    extra_count: int = 0

    def lengths(self) -> list[int]:
        """Of each level."""
        if not self.depth:
            return [0] * NUM_LEVELS
        least = math.log(self.least_chance) * (1.0 + 1e-9)
        return [min(int(least / chance), self.depth) for chance in _LOG_CHANCES]


class SpeculationController:
    """Chooses draft lengths from what was accepted so far and from what steps cost. Single-threaded."""

    def __init__(self, profile: SpeculationProfile) -> None:
        self.profile = profile
        self._acceptances = Acceptances(NUM_LEVELS)
        self._steps = StepCosts(profile.step_seconds)
        self._proposals = ProposalCosts(profile.draft_seconds, profile.first_draft_seconds)
        candidates = [
            (chance**index, level, index)
            for level, chance in enumerate(_CHANCES)
            for index in range(1, profile.max_draft_tokens + 1)
            if chance**index >= _LEAST_CHANCE
        ]
        self._candidates = sorted(candidates, key=lambda some: (-some[0], some[2]))
        self._plans = 0
        # The choice in use, the lengths of levels that it means, what it gains, and for which batch and how many plans.
        self._choice, self._level_lengths, self._gain = _Choice(0.0), [0] * NUM_LEVELS, 1.0
        self._choice_batch: list[int] = []
        self._choice_plans = self._num_choices = 0
        self._plans_with_drafts = 0
        self._allowance = 0.0
        self._patience, self._patience_requests = 1.0, 0
        # Plans that need not be made because drafts do not pay, for up to how many requests that was found, and plans not made so far.
        self._rest_plans = self._rest_requests = self._plans_skipped = 0
        # Even perfect drafts would not pay.
        self._hopeless = False
        # All requests of the last plan with drafts had some in the plans before it.
        self._steady = True

    def rests(self, num_requests: int) -> bool:
        """Whether there is nothing to plan for a step of so many requests: drafts did not pay a moment ago, when there were as many. Asked
        once for each step; a plan that is not made costs nothing, which is what makes it as fast as no speculation."""
        if not self._rest_plans or num_requests < self._rest_requests:
            return False
        self._rest_plans -= 1
        self._plans_skipped += 1
        return True

    def plan(self, keys: Sequence[RequestKey], num_others: int) -> list[int]:
        """How many drafts to propose for each of these requests, which sample in the step that is being made and will all be in the next
        one; `num_others` requests that cannot have drafts will be in it as well, with a token each."""
        if not self.profile.adaptive or not keys:
            return [self.profile.max_draft_tokens] * len(keys)
        self._plans += 1 + self._plans_skipped
        records = [self._acceptances.record(key, self._plans) for key in keys]
        # One at a time returns to the rate of all; those that are tried are renewed then.
        self._acceptances.renew(records[self._plans % len(records)], self._plans)
        num_requests = len(keys) + num_others
        self._choose(records, num_requests)
        needed = _GAIN_TO_GO_ON if self._plans_with_drafts else _GAIN_TO_BEGIN
        enough = self._gain >= 1.0 + needed * sum(record.hits for record in records) / len(records)
        if not enough and not 0 < self._plans_with_drafts < _LEAST_PLANS:
            self._plans_with_drafts = 0
            lengths = [0] * len(records)
        else:
            if self._pauses():
                return [0] * len(records)
            lengths = self._lengths(records)
        self._try_one(records, lengths, num_requests)
        self._plans_skipped = 0
        # A request that begins to have drafts first has the draft model catch up with it, which later proposals need not do.
        self._steady = True
        for record, length in zip(records, lengths, strict=True):
            if length and record.plans_drafting < _PLANS_TO_SETTLE:
                self._steady = False
            record.plans_drafting = record.plans_drafting + 1 if length else 0
        if any(lengths):
            if self._steady:
                self._proposals.planned(lengths)
            self._rest_plans = 0
        else:
            self._rest_plans, self._rest_requests = _LONG_REST if self._hopeless else _SHORT_REST, num_requests
        return lengths

    def verified(self, key: RequestKey, num_drafts: int, num_accepted: int) -> None:
        """A step has verified drafts of a request."""
        if not self.profile.adaptive or num_drafts < 1:
            return
        record = self._acceptances.verified(key, num_drafts, num_accepted, self._plans)
        if record is not None and record.probing:
            record.probing = False
            self._patience = 1.0 if num_accepted else min(2.0 * self._patience, _MOST_PATIENCE)

    def unproposed(self, key: RequestKey) -> None:
        """Drafts were wanted of a request, and the proposer had none."""
        if self.profile.adaptive:
            self._acceptances.unproposed(key)

    def step_done(self, num_tokens: int, seconds: float, num_proposing: int, draft_seconds: float) -> None:
        """A step in which all requests decoded (with or without drafts) took `seconds`, of which `draft_seconds` went into proposals for
        `num_proposing` requests. With several steps in flight, a step's time begins when the one before it has come back."""
        if not self.profile.adaptive or self._rest_plans > 1:
            return
        if num_proposing and self._steady:
            self._proposals.observe(num_proposing, draft_seconds)
        self._steps.observe(num_tokens, seconds - draft_seconds, proposing=num_proposing > 0)

    def forget(self, key: RequestKey) -> None:
        """The request has ended."""
        self._acceptances.forget(key)

    def _choose(self, records: list[Record], num_requests: int) -> None:
        """Choose anew, unless that was done a few plans ago for such a batch. Of many requests it matters little that some change their
        level in between, because what was chosen says for every level how long drafts may be."""
        batch = [len(records), num_requests]
        if len(records) <= _FEW_REQUESTS:
            batch += [record.level for record in records]
        self._choice_plans += 1
        if batch == self._choice_batch and self._choice_plans < _PLANS_PER_CHOICE:
            return
        self._choice_batch, self._choice_plans = batch, 0
        self._num_choices += 1
        most = self.profile.max_draft_tokens
        depths = range(1, most + 1)
        if self._choice.depth and self._num_choices % _CHOICES_PER_SEARCH:
            depths = range(max(self._choice.depth - 1, 1), min(self._choice.depth + 1, most) + 1)
        choice, self._gain = self._best(records, num_requests, depths)
        if choice.depth or not 0 < self._plans_with_drafts < _LEAST_PLANS:
            self._choice = choice
        self._hopeless = (
            self._gain == 1.0 and self._best(records, num_requests, range(0), NUM_LEVELS - 1)[1] < 1.0 + _GAIN_TO_BEGIN
        )
        self._level_lengths = self._choice.lengths()

    def _pauses(self) -> bool:
        """Whether this plan, which could have drafts, goes without to see a step that has none. A small gain is doubted sooner."""
        self._plans_with_drafts += 1
        least, most = _PAUSE_INTERVALS
        interval = min(max(int(2.0 * (1.0 - 1.0 / self._gain) / _PAUSE_SHARE), least), most)
        if self._plans_with_drafts <= interval:
            return False
        if self._plans_with_drafts > interval + 1:
            self._plans_with_drafts = 1
        return True

    def _lengths(self, records: list[Record]) -> list[int]:
        """What was chosen for levels, request by request."""
        level_lengths, extra = self._level_lengths, self._choice.extra_count
        lengths = [level_lengths[record.level] for record in records]
        if extra:
            for index, record in enumerate(records):
                if record.level == self._choice.extra_level:
                    lengths[index] += 1
                    extra -= 1
                    if not extra:
                        break
        return lengths

    def _best(
        self, records: list[Record], num_requests: int, depths: range, level: int | None = None
    ) -> tuple[_Choice, float]:
        """The choice of the highest rate, and how many times the rate without drafts that is; as if all requests were of `level`, if one
        is given. depths: of passes, the most of which have to be among those that are tried."""
        counts, hits = [0] * NUM_LEVELS, [0.0] * NUM_LEVELS
        for record in records:
            place = record.level if level is None else level
            counts[place] += 1
            hits[place] += record.hits
        candidates = [some for some in self._candidates if counts[some[1]]]
        plain_rate = num_requests / self._steps.seconds(num_requests, proposing=False)
        best = _Choice(plain_rate)
        # A pass of a draft model costs nearly the same for one request as for all, so it matters how many passes there are at most. Where
        # all requests are alike, stopping early says the same.
        if not self._proposals.has_passes or max(counts) == len(records):
            depths = range(self.profile.max_draft_tokens, self.profile.max_draft_tokens + 1)
        for depth in depths:
            some = [candidate for candidate in candidates if candidate[2] <= depth]
            choice = self._best_prefix(some, counts, hits, num_requests)
            if choice.rate > best.rate:
                best = choice
        return best, best.rate / plain_rate

    def _best_prefix(
        self, candidates: list[tuple[float, int, int]], counts: list[int], hits: list[float], num_requests: int
    ) -> _Choice:
        """The best place to stop in the order of candidates: (chance, level, index)."""
        step_seconds, pass_seconds, bends = self._steps.seconds, self._proposals.pass_seconds, self._steps.bends
        passes = [0] * (self.profile.max_draft_tokens + 1)
        num_tokens = tokens = float(num_requests)
        proposing = best = 0.0
        num_taken, extra_level, extra_count = 0, -1, 0
        next_bend = bisect_right(bends, num_tokens)
        for place, (chance, level, index) in enumerate(candidates):
            count, weight, before = counts[level], hits[level], passes[index]
            while next_bend < len(bends) and bends[next_bend] < num_tokens + weight:
                # Within the candidates of a level, the best place to stop is where the cost of a token changes.
                some = int((bends[next_bend] - num_tokens) / weight * count)
                part = some / count * weight
                seconds = proposing + pass_seconds(index, before + some) - pass_seconds(index, before)
                seconds += step_seconds(num_tokens + part, proposing=True)
                if some and tokens + part * chance > best * seconds:
                    best, num_taken, extra_level, extra_count = (tokens + part * chance) / seconds, place, level, some
                next_bend += 1
            proposing += pass_seconds(index, before + count) - pass_seconds(index, before)
            passes[index] = before + count
            num_tokens += weight
            tokens += weight * chance
            rate = tokens / (step_seconds(num_tokens, proposing=True) + proposing)
            if rate > best:
                best, num_taken, extra_count = rate, place + 1, 0
        if not num_taken and not extra_count:
            return _Choice(best)
        least_chance = candidates[num_taken - 1][0] if num_taken else 1.0
        depth = max((candidate[2] for candidate in candidates[:num_taken]), default=1)
        return _Choice(best, depth, least_chance, extra_level, extra_count)

    def _try_one(self, records: list[Record], lengths: list[int], num_requests: int) -> None:
        """Give one of the requests without drafts a single one, if that can be afforded and may show something new."""
        if all(lengths):
            return
        plain = self._steps.seconds(num_requests, proposing=False)
        num_tokens, num_proposing = num_requests + sum(lengths), len(lengths) - lengths.count(0)
        with_one = self._steps.seconds(num_tokens + 1, proposing=True) + self._proposals.pass_seconds(
            1, num_proposing + 1
        )
        if num_proposing:
            without = self._steps.seconds(num_tokens, proposing=True) + self._proposals.pass_seconds(1, num_proposing)
        else:
            without = plain
        cost = max(with_one - without, _LEAST_TRIAL_COST * plain)
        if num_requests <= 0.75 * self._patience_requests:
            # What did not pay in a large batch may pay in a small one.
            self._patience, self._patience_requests = 1.0, num_requests
        self._patience_requests = max(self._patience_requests, num_requests)
        self._allowance += _TRIAL_SHARE * plain * (1 + self._plans_skipped)
        if self._allowance < cost * self._patience:
            return
        self._allowance = 0.0
        if self._hopeless:
            return
        chosen = min(
            (index for index, length in enumerate(lengths) if not length), key=lambda index: records[index].last_probe
        )
        records[chosen].last_probe = self._plans
        records[chosen].probing = True
        lengths[chosen] = 1
