"""How often drafts are accepted: of each request, and of all.

A draft is taken to be accepted with probability a, given that those before it were, so that draft i is reached and accepted with
probability a^i. d drafts of which j were accepted are j successes, and one failure if j < d; drafts behind a failure say nothing. A
request's a is the share of successes among its recent trials, together with a few imagined ones at the rate of all requests. What was
seen long ago counts less and less, so that a request that is not tried any more returns to that rate.

Whether there is a draft at all (n-gram finds none in most places) is a rate of its own, which says nothing about a.
"""

from __future__ import annotations

from penstock.engine.step import RequestKey

# What is believed of drafts before any was seen, and as how many trials that counts. Hopeful: what is not tried is not learned, and a few
# trials put it right.
_FIRST_RATE, _FIRST_TRIALS = 0.85, 8.0
# What one trial leaves of the weight of those before it.
_KEEP_OF_REQUEST, _KEEP_OF_ALL = 0.96, 0.995
# As how many trials of a request the rate of all counts.
_PRIOR_TRIALS = 4.0
# Plans after which a request's trials count half.
_HALF_LIFE = 128.0
_HIT_RATE = 0.1


class Record:
    """What is known of one request. last_trial: the plan after which it was tried last; level: see Acceptances; probing: a draft is under
    way only to learn from it; last_probe: the plan that asked for the last one of that kind; plans_drafting: so many plans, the last ones,
    asked for drafts."""

    __slots__ = ("hits", "last_probe", "last_trial", "level", "plans_drafting", "probing", "successes", "trials")

    def __init__(self, plan: int, hits: float) -> None:
        self.successes = self.trials = 0.0
        self.last_trial = self.last_probe = plan
        self.level = 0
        self.hits = hits
        self.probing = False
        self.plans_drafting = 0


class Acceptances:
    """Records of requests. A level is a request's a in steps of 1 / num_levels."""

    def __init__(self, num_levels: int) -> None:
        self._num_levels = num_levels
        self._records: dict[RequestKey, Record] = {}
        self._trials, self._successes = _FIRST_TRIALS, _FIRST_RATE * _FIRST_TRIALS
        self._hits = 1.0

    def __len__(self) -> int:
        """Requests with a record."""
        return len(self._records)

    def record(self, key: RequestKey, plan: int) -> Record:
        """A request's record; a new one if it is new. plan: number of the plan that is being made."""
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = Record(plan, self._hits)
            self.renew(record, plan)
        return record

    def renew(self, record: Record, plan: int) -> None:
        """Bring a record's level up to date."""
        kept = 0.5 ** ((plan - record.last_trial) / _HALF_LIFE)
        rate = self._successes / self._trials
        a = (record.successes * kept + rate * _PRIOR_TRIALS) / (record.trials * kept + _PRIOR_TRIALS)
        record.level = min(int(a * self._num_levels), self._num_levels - 1)

    def verified(self, key: RequestKey, num_drafts: int, num_accepted: int, plan: int) -> Record | None:
        """Count trials; the request's record, unless it is forgotten."""
        trials = min(num_accepted + 1, num_drafts)
        kept = _KEEP_OF_ALL**trials
        self._trials = self._trials * kept + trials
        self._successes = self._successes * kept + num_accepted
        record = self._records.get(key)
        if record is not None:
            kept = _KEEP_OF_REQUEST**trials * 0.5 ** ((plan - record.last_trial) / _HALF_LIFE)
            record.trials = record.trials * kept + trials
            record.successes = record.successes * kept + num_accepted
            record.last_trial = plan
            self._asked(record, 1.0)
            self.renew(record, plan)
        return record

    def unproposed(self, key: RequestKey) -> None:
        """There was nothing to propose."""
        record = self._records.get(key)
        if record is not None:
            record.probing = False
            self._asked(record, 0.0)

    def forget(self, key: RequestKey) -> None:
        self._records.pop(key, None)

    def _asked(self, record: Record, found: float) -> None:
        record.hits += (found - record.hits) * _HIT_RATE
        self._hits += (found - self._hits) * _HIT_RATE / 10
