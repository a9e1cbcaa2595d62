"""What restricts a request's output to a language, and the masks that a step needs of it.

    drafts                   d1        d2        d3
    matcher     ──▶ mask ──accept──▶ mask ──accept──▶ mask ──refuse
                     │                │                │
    sampled behind   t                d1               d2            three masks, two drafts; then two tokens are rolled back

One matcher belongs to one sample. It has seen exactly the output that is known: the scheduler feeds it tokens when their step has
retired, so that a preempted request goes on with the matcher that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Matcher(Protocol):
    """Follows the output of one sample. Its methods must not raise: what a client can get wrong is refused when the matcher is made."""

    @property
    def is_finished(self) -> bool:
        """Nothing can follow: the request ends here, with finish reason "stop"."""
        ...

    def mask(self) -> bytes:
        """Which tokens may come next, end-of-sequence tokens included: bit v % 8 of byte v // 8 for token v. At least one may, unless
        the matcher is finished, when it is not asked."""
        ...

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False, and nothing has changed, when it may not come next."""
        ...

    def rollback(self, count: int) -> None:
        """Forget the last `count` accepted tokens."""
        ...


def masks_along(matcher: Matcher, drafts: Sequence[int]) -> tuple[list[int], list[bytes]]:
    """The drafts up to the first one that the matcher refuses or ends with, and the masks behind the last known token and behind each of
    these drafts. A draft that ends the output is of no use: there is nothing to sample behind it. The matcher is left as it was."""
    masks = [matcher.mask()]
    usable: list[int] = []
    num_accepted = 0
    for draft in drafts:
        if not matcher.accept(draft):
            break
        num_accepted += 1
        if matcher.is_finished:
            break
        usable.append(draft)
        masks.append(matcher.mask())
    if num_accepted:
        matcher.rollback(num_accepted)
    return usable, masks
