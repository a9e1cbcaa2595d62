"""How many draft tokens each request should have verified at once."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.engine.executor import SpeculationProfile
from penstock.engine.step import RequestKey


class SpeculationController:
    """Chooses draft lengths from what was accepted so far and from what steps cost. Single-threaded."""

    def __init__(self, profile: SpeculationProfile) -> None:
        self.profile = profile

    def plan(self, keys: Sequence[RequestKey], num_others: int) -> list[int]:
        """How many drafts to propose for each of these requests, which sample in the step that is being made and will all be in the next
        one; `num_others` requests that cannot have drafts will be in it as well, with a token each."""
        return [self.profile.max_draft_tokens] * len(keys)

    def verified(self, key: RequestKey, num_drafts: int, num_accepted: int) -> None:
        """A step has verified drafts of a request."""

    def unproposed(self, key: RequestKey) -> None:
        """Drafts were wanted of a request, and the proposer had none."""

    def step_done(self, num_tokens: int, seconds: float, num_proposing: int, draft_seconds: float) -> None:
        """A step in which all requests decoded (with or without drafts) took `seconds`, of which `draft_seconds` went into proposals for
        `num_proposing` requests."""

    def forget(self, key: RequestKey) -> None:
        """The request has ended."""
