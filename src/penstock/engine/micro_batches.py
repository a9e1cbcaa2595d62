"""How the running requests are divided over the steps that the stages of a pipeline work on.

A request that a step in flight computes cannot be in the next one: what it would start from is still being sampled. So that no stage is
idle, each of p steps in flight takes its part of the requests, here p = 2 with the requests a to d:

    stage 1   [ a b ][ c d ][ a b ][ c d ] …
    stage 2          [ a b ][ c d ][ a b ] …
                            ▲ the tokens of a and b are known: they are free for the next step

Requests come and go, so the parts are made anew with each step: those that are not in flight are divided over the steps that are still
to be filled, and none gets more than one p-th of all. Those that have waited longest come first. A part that has become small is
filled up from what a larger one leaves over, and by new prompts:

    a and b end    [ c d ]  in flight        then  [ c ]  and  [ d ]
    e comes        [ c e ]  and  [ d ]
    one is left    [ c ]    alone in its step, and the other stages wait for it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.engine.request import Request


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """`stages` steps at once, never more, of which `num_inflight` are on their way."""

    stages: int
    num_inflight: int

    def share(self, running: Sequence[Request], num_waiting: int = 0) -> int:
        """The most requests for the next step, of those that run, in flight or not, and so many more."""
        num_free = sum(not request.num_inflight for request in running) + num_waiting
        steps_left = max(1, self.stages - self.num_inflight)
        return min(_divide(len(running) + num_waiting, self.stages), _divide(num_free, steps_left))

    def next_decodes(self, decoding: Sequence[Request]) -> list[Request]:
        """Of the requests that decode, in flight or not, those for the next step."""
        free = [request for request in decoding if not request.num_inflight]
        most = self.share(decoding)
        if len(free) <= most:
            return free
        # Stable, so that requests that ran in the same step keep their order.
        return sorted(free, key=lambda request: request.last_step_id)[:most]


def _divide(number: int, by: int) -> int:
    return -(-number // by)
