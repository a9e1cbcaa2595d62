"""What a step in which requests only decode takes, by its number of tokens: measured at the start, corrected while it runs.

    seconds(tokens) = measured(tokens) · correction(tokens)

`measured` joins the points of SpeculationProfile by straight lines. There is a correction for each size, four sizes to a doubling; it
follows the ratio of what steps took to what was measured, as a running mean of its logarithm. Where nothing was seen lately, the nearest
correction holds: a machine that is three times slower than when it was measured is so for all sizes.

Steps that ask for proposals have corrections of their own. Where a step normally starts before the one before it has come back, a step
that waits for proposals cannot, and that is part of what speculation costs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

Points = Sequence[tuple[int, float]]

# Sizes with corrections: up to 2 ** 16 tokens.
_NUM_SIZES = 64
# How fast a correction follows, and after how many steps what was seen is taken for outdated.
_RATE = 0.05
_LIFETIME_STEPS = 1000
# As how many steps of a size counts what was believed before the first one was seen.
_TRUST = 3.0
# Changes of a correction's logarithm below it are not worth the work of using them.
_NOTABLE = 0.02


class Curve:
    """Straight lines through points of ascending places; the first value before them, the last line's continuation behind them."""

    def __init__(self, points: Points) -> None:
        self.places = [place for place, _ in points]
        self._values = [value for _, value in points]

    def at(self, place: float) -> float:
        places, values = self.places, self._values
        if place <= places[0] or len(places) == 1:
            return values[0]
        right = min(max(bisect_right(places, place), 1), len(places) - 1)
        left = right - 1
        slope = (values[right] - values[left]) / (places[right] - places[left])
        # What was measured last may by chance have been faster than what was measured before it.
        return values[left] + max(slope, 0.0 if place > places[-1] else slope) * (place - places[left])


class _Corrections:
    """Running means of log(seconds / measured), one per size."""

    def __init__(self) -> None:
        self._means = [0.0] * _NUM_SIZES
        self._counts = [0] * _NUM_SIZES
        self._last_steps = [-_LIFETIME_STEPS] * _NUM_SIZES

    def observe(self, size: int, ratio: float, believed: float, step: int) -> float:
        """Count a logarithm of a ratio in; the mean with it. believed: what the mean is taken for when nothing is known of this size."""
        if step - self._last_steps[size] >= _LIFETIME_STEPS:
            self._counts[size], self._means[size] = 0, believed
        self._counts[size] += 1
        self._means[size] += (ratio - self._means[size]) * max(_RATE, 1.0 / (self._counts[size] + _TRUST))
        self._last_steps[size] = step
        return self._means[size]

    def everywhere(self, step: int) -> list[float] | None:
        """Each size's mean, or that of the nearest one which was seen lately; None where none was."""
        known = [size for size in range(_NUM_SIZES) if step - self._last_steps[size] < _LIFETIME_STEPS]
        if not known:
            return None
        means, place = [], 0
        for size in range(_NUM_SIZES):
            while place + 1 < len(known) and known[place + 1] - size <= size - known[place]:
                place += 1
            means.append(self._means[known[place]])
        return means


class StepCosts:
    """Seconds of a step, without those of its proposals.

    points: (tokens, seconds) as in SpeculationProfile; without any, all steps are taken to cost the same until they are seen.
    """

    def __init__(self, points: Points) -> None:
        self._curve = Curve(points or [(1, 0.01)])
        self._corrections = {False: _Corrections(), True: _Corrections()}
        self._used = {False: [0.0] * _NUM_SIZES, True: [0.0] * _NUM_SIZES}
        self._known: dict[bool, dict[int, float]] = {False: {}, True: {}}
        self._step = self._last_renewal = 0

    @property
    def bends(self) -> list[int]:
        """Numbers of tokens at which the cost of one more may change."""
        return self._curve.places

    def seconds(self, num_tokens: float, *, proposing: bool) -> float:
        """What a step of `num_tokens`, at least 1, should take."""
        place = round(num_tokens)
        known = self._known[proposing]
        seconds = known.get(place)
        if seconds is None:
            seconds = known[place] = self._curve.at(place) * math.exp(self._used[proposing][_size(place)])
        return seconds

    def observe(self, num_tokens: int, seconds: float, *, proposing: bool) -> None:
        """A step of `num_tokens` took `seconds`."""
        if num_tokens < 1 or seconds <= 0.0:
            return
        self._step += 1
        ratio = math.log(seconds / self._curve.at(num_tokens))
        size = _size(num_tokens)
        # The very first step says how fast this machine is; later ones are held against what is believed of their size by then.
        believed = self._used[proposing][size] if self._step > 1 else ratio
        mean = self._corrections[proposing].observe(size, ratio, believed, self._step)
        outdated = self._step - self._last_renewal > _LIFETIME_STEPS // 8
        if outdated or abs(mean - self._used[proposing][size]) > _NOTABLE:
            self._renew()

    def _renew(self) -> None:
        self._last_renewal = self._step
        seen = {kind: some.everywhere(self._step) for kind, some in self._corrections.items()}
        for kind in (False, True):
            self._used[kind] = seen[kind] or seen[not kind] or self._used[kind]
            self._known[kind].clear()


def _size(num_tokens: int) -> int:
    """A number for tokens of about the same count: each count up to 8 has its own, then there are four to a doubling."""
    power = min(num_tokens.bit_length() - 1, _NUM_SIZES // 4 - 1)
    return min(4 * power + (num_tokens << 2 >> power) - 4, _NUM_SIZES - 1)


class ProposalCosts:
    """Seconds of proposing.

    With a draft model, each pass proposes one token for the requests that still want one, and costs what was measured for as many, the
    first one apart; all passes are corrected alike. Without measurements (n-gram), what a request costs is learned, however many tokens it
    wants.
    """

    def __init__(self, points: Points, first_points: Points = ()) -> None:
        self._curve = Curve(points) if points else None
        self._first_curve = Curve(first_points) if first_points else self._curve
        self._passes: dict[tuple[bool, int], float] = {(False, 0): 0.0, (True, 0): 0.0}
        self._per_request = 0.0
        self._scale = 1.0
        self._planned = self._measured = -1.0

    @property
    def has_passes(self) -> bool:
        """Whether each token takes a pass of its own."""
        return self._curve is not None

    def pass_seconds(self, index: int, num_requests: int) -> float:
        """Of pass `index`, from 1, in which `num_requests` take part."""
        if self._curve is None:
            return self._per_request * num_requests if index == 1 else 0.0
        return self._measured_seconds(index == 1, num_requests) * self._scale

    def planned(self, lengths: Sequence[int]) -> None:
        """Proposals of these lengths are asked for, of which some are above 0."""
        if self._curve is None:
            return
        by_length = [0] * (max(lengths) + 1)
        for length in lengths:
            by_length[length] += 1
        seconds, still = 0.0, 0
        for count in by_length[:0:-1]:
            still += count
            seconds += self._measured_seconds(False, still)
        seconds += self._measured_seconds(True, still) - self._measured_seconds(False, still)
        if self._planned < 0.0:
            # What was measured at the start holds until several proposals say otherwise.
            self._planned = self._measured = seconds
        self._planned += (seconds - self._planned) * _RATE
        # Means of both, because what is measured belongs to what was planned a step or two earlier.
        self._scale = min(max(self._measured / self._planned, 0.02), 50.0)

    def _measured_seconds(self, first: bool, num_requests: int) -> float:
        """Of the first pass, or of one behind it."""
        seconds = self._passes.get((first, num_requests))
        if seconds is None:
            curve = self._first_curve if first else self._curve
            seconds = self._passes[first, num_requests] = 0.0 if curve is None else curve.at(num_requests)
        return seconds

    def observe(self, num_requests: int, seconds: float) -> None:
        """Proposing for `num_requests`, at least 1, took `seconds`."""
        self._measured += (seconds - self._measured) * _RATE
        self._per_request += (seconds / num_requests - self._per_request) * 0.1
