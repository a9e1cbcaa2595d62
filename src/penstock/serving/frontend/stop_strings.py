"""Stop strings in text that arrives in pieces.

    text  [ emitted | held: may be the beginning of a stop string | new piece ]

Only the longest end of the text that is a beginning of some stop string is held back. That length is known in constant amortised
time per character from the prefix function of each stop string (Knuth, Morris, Pratt, "Fast Pattern Matching in Strings", 1977).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`text` to emit before the end, and the `stop` string that ended it."""

    text: str
    stop: str


class _Matcher:
    """Progress of one stop string: `matched` characters of it end the text so far."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self._borders = prefix_function(pattern)

    def step(self, char: str) -> bool:
        """Add a character; True when the stop string is complete."""
        while self.matched and self.pattern[self.matched] != char:
            self.matched = self._borders[self.matched - 1]
        if self.pattern[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.pattern)


class StopChecker:
    """Cuts one sample's text at the first stop string to be completed; of several completed by one character, the longest.

    `include`: the stop string itself stays in the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._matchers = [_Matcher(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include = include
        self._held = ""

    def feed(self, text: str) -> str | StopMatch:
        """The text that can be emitted now, or the match that ends the text; nothing may be fed after a match."""
        if not self._matchers:
            return text
        for position, char in enumerate(text):
            complete = [matcher for matcher in self._matchers if matcher.step(char)]
            if complete:
                stop = complete[0].pattern
                whole = self._held + text[: position + 1]
                self._held = ""
                return StopMatch(whole if self._include else whole[: len(whole) - len(stop)], stop)
        whole = self._held + text
        keep = max(matcher.matched for matcher in self._matchers)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def finish(self) -> str:
        """The held text, at the end of the output."""
        held, self._held = self._held, ""
        return held


def prefix_function(pattern: str) -> list[int]:
    """For each position the length of the longest proper prefix of `pattern` that ends there."""
    borders = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = borders[length - 1]
        if pattern[position] == pattern[length]:
            length += 1
        borders[position] = length
    return borders
