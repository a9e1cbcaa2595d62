"""The one rule of what "the same tokens" means.

Greedy tokens must equal the reference's up to the first position where the reference's top two logits are closer than a margin. There
the order of two sums decides, so from there on the texts may part; such a position is excused, counted and capped. Where
kernels give bit-equal logits no margin is needed: compare the lists with ==.

    reference        t0 t1 t2 t3 t4 …        margin of the top two   9.1 4.0 2.2 0.0004 …
    ours             t0 t1 t2 u3 …           parts at 3, where the margin is below 0.001: excused
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Several times the rounding differences of fp32 logits between two orders of summation.
DEFAULT_MARGIN = 1e-3
DEFAULT_MAX_EXCUSED_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class GreedyComparison:
    """One generation against its reference.

    `num_equal`: tokens before the first difference. `first_difference`: its position, None when there is none.
    `reference_margin`: the reference's top-two margin there. `excused`: it is below the margin.
    """

    num_equal: int
    first_difference: int | None = None
    reference_margin: float | None = None
    excused: bool = False

    @property
    def exact(self) -> bool:
        """No difference at all."""
        return self.first_difference is None

    @property
    def ok(self) -> bool:
        return self.exact or self.excused


def compare_greedy(
    tokens: Sequence[int],
    reference: Sequence[int],
    reference_margins: Sequence[float],
    *,
    margin: float = DEFAULT_MARGIN,
) -> GreedyComparison:
    """Compare greedy tokens with the reference's. `reference_margins[i]`: top-two logit margin behind `reference[i]`.

    Ending earlier or later than the reference is a difference at the first token that only one of them has; it is excused
    like any other. Raises ValueError when a reference token has no margin.
    """
    if len(reference_margins) < len(reference):
        raise ValueError(f"{len(reference)} reference tokens but only {len(reference_margins)} margins")
    shorter = min(len(tokens), len(reference))
    position = next((i for i in range(shorter) if tokens[i] != reference[i]), None)
    if position is None:
        if len(tokens) == len(reference):
            return GreedyComparison(shorter)
        position = shorter
    if position >= len(reference):
        return GreedyComparison(position, position)
    reference_margin = float(reference_margins[position])
    return GreedyComparison(position, position, reference_margin, excused=reference_margin < margin)


def mismatch_report(
    comparisons: Sequence[GreedyComparison], *, max_excused_share: float = DEFAULT_MAX_EXCUSED_SHARE
) -> str | None:
    """None when all comparisons are fine and few enough are excused, else what is wrong, for `assert report is None, report`."""
    wrong = [(i, c) for i, c in enumerate(comparisons) if not c.ok]
    if wrong:
        index, first = wrong[0]
        return (
            f"{len(wrong)} of {len(comparisons)} generations differ; the first is number {index}, at token "
            f"{first.first_difference}, where the reference's top-two margin is {first.reference_margin}"
        )
    excused = sum(comparison.excused for comparison in comparisons)
    allowed = int(max_excused_share * len(comparisons))
    if excused > allowed:
        return f"{excused} of {len(comparisons)} generations part at a close call; at most {allowed} may"
    return None
