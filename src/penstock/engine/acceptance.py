"""How often drafts are accepted: of each request, and of all.

A draft is taken to be accepted with probability a, given that those before it were, so that draft i is reached and accepted with
probability a^i. d drafts of which j were accepted are j successes, and one failure if j < d; drafts behind a failure say nothing. A
request's a is the share of successes among its recent trials, together with a few imagined ones at the rate of all requests.

Whether there is a draft at all (n-gram finds none in most places) says nothing about a.
"""

from __future__ import annotations

import math

from penstock.engine.step import RequestKey

# What is believed of drafts before any was seen, and as how many trials that counts. Hopeful: what is not tried is not learned, and a few
# trials put it right.
_FIRST_RATE, _FIRST_TRIALS = 0.85, 8.0
# What one trial leaves of the weight of those before it.
_KEEP_OF_REQUEST, _KEEP_OF_ALL = 0.96, 0.995
# As how many trials of a request the rate of all counts.
_PRIOR_TRIALS = 4.0
# Drafts that are less likely than this to be accepted are left out, and the first one of a request only if it is hardly ever accepted.
_LEAST_CHANCE, _HARDLY_EVER = 0.12, 0.05
_LONGEST = 64


class Record:
    """What is known of one request. longest: drafts up to there are likely enough; last_probe: the plan that asked for a single draft to
    see whether they are again."""

    __slots__ = ("last_probe", "longest", "successes", "trials")

    def __init__(self, rate: float) -> None:
        self.successes = self.trials = 0.0
        self.longest = _longest(rate)
        self.last_probe = 0


class Acceptances:
    """Records of requests."""

    def __init__(self) -> None:
        self._records: dict[RequestKey, Record] = {}
        self._trials, self._successes = _FIRST_TRIALS, _FIRST_RATE * _FIRST_TRIALS

    def __len__(self) -> int:
        """Requests with a record."""
        return len(self._records)

    def record(self, key: RequestKey) -> Record:
        """A request's record; a new one if it is new."""
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = Record(self._successes / self._trials)
        return record

    def verified(self, key: RequestKey, num_drafts: int, num_accepted: int) -> None:
        """Count trials."""
        trials = min(num_accepted + 1, num_drafts)
        kept = _KEEP_OF_ALL**trials
        self._trials = self._trials * kept + trials
        self._successes = self._successes * kept + num_accepted
        record = self._records.get(key)
        if record is None:
            return
        kept = _KEEP_OF_REQUEST**trials
        record.trials = record.trials * kept + trials
        record.successes = record.successes * kept + num_accepted
        rate = self._successes / self._trials
        a = (record.successes + rate * _PRIOR_TRIALS) / (record.trials + _PRIOR_TRIALS)
        record.longest = _longest(a)

    def forget(self, key: RequestKey) -> None:
        self._records.pop(key, None)


def _longest(a: float) -> int:
    """The last i with a^i of at least _LEAST_CHANCE, or 1, or 0."""
    if a >= 1.0:
        return _LONGEST
    if a < _LEAST_CHANCE:
        return int(a >= _HARDLY_EVER)
    return min(int(math.log(_LEAST_CHANCE) / math.log(a) + 1e-9), _LONGEST)
