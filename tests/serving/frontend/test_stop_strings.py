"""Stop strings cut text in the same place however it arrives, and hold back no more than they must."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.serving.frontend.stop_strings import StopChecker, StopMatch

SMALL_TEXT = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Slow and obvious: the first end of the text that is a stop string; of several the longest."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@settings(max_examples=200, deadline=None)
@given(text=SMALL_TEXT, stops=STOPS, size=st.integers(1, 6), include=st.booleans())
def test_equals_the_slow_reference(text: str, stops: list[str], size: int, include: bool) -> None:
    checker = StopChecker(stops, include=include)
    emitted, stopped = "", None
    for begin in range(0, len(text), size):
        result = checker.feed(text[begin : begin + size])
        if isinstance(result, StopMatch):
            emitted, stopped = emitted + result.text, result.stop
            break
        emitted += result
        held = text[: begin + size][len(emitted) :]
        # Held text is the beginning of a stop string, and no longer end of the text is one.
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(text[: begin + size][start:]) for stop in stops for start in range(len(emitted)))
    if stopped is None:
        emitted += checker.finish()
    assert (emitted, stopped) == reference(text, stops, include)


def test_without_stop_strings_nothing_is_held() -> None:
    checker = StopChecker(())
    assert checker.feed("anything") == "anything"
    assert checker.finish() == ""


def test_across_pieces() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert checker.feed("Hello\n") == "Hello"
    assert checker.feed("\nUs") == ""
    assert checker.feed("e me") == "\n\nUse me"
    assert checker.feed("\n\nUser") == ""
    assert checker.feed(": more") == StopMatch("", "\n\nUser:")
