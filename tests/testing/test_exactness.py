"""The exactness rule itself."""

from __future__ import annotations

import pytest

from penstock.testing.exactness import GreedyComparison, compare_greedy, mismatch_report


def test_equal_tokens_are_exact() -> None:
    result = compare_greedy([1, 2, 3], [1, 2, 3], [5.0, 5.0, 5.0])
    assert result == GreedyComparison(3)
    assert result.exact
    assert result.ok


def test_difference_at_a_clear_decision_is_wrong() -> None:
    result = compare_greedy([1, 9, 3], [1, 2, 3], [5.0, 0.5, 5.0])
    assert result == GreedyComparison(1, 1, 0.5, excused=False)
    assert not result.ok


def test_difference_at_a_close_call_is_excused_and_so_is_all_after_it() -> None:
    result = compare_greedy([1, 9, 8, 7], [1, 2, 3, 4], [5.0, 1e-5, 5.0, 5.0])
    assert result == GreedyComparison(1, 1, 1e-5, excused=True)
    assert result.ok
    assert not result.exact


def test_a_close_call_that_agrees_excuses_nothing_later() -> None:
    assert not compare_greedy([1, 2, 9], [1, 2, 3], [5.0, 1e-5, 5.0]).ok


@pytest.mark.parametrize(("tokens", "reference"), [([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 2]), ([], [1])])
def test_different_lengths_are_a_difference(tokens: list[int], reference: list[int]) -> None:
    result = compare_greedy(tokens, reference, [5.0] * len(reference))
    assert result.first_difference == min(len(tokens), len(reference))
    assert not result.ok


def test_missing_margins_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 reference tokens but only 1 margins"):
        compare_greedy([1, 2], [1, 2], [1.0])


def test_report_names_the_first_wrong_generation_and_caps_the_excused() -> None:
    good, excused, wrong = GreedyComparison(9), GreedyComparison(3, 3, 1e-5, True), GreedyComparison(4, 4, 0.7)
    assert mismatch_report([good] * 20) is None
    assert mismatch_report([good] * 19 + [excused]) is None
    assert mismatch_report([good] * 18 + [excused] * 2) == "2 of 20 generations part at a close call; at most 1 may"
    report = mismatch_report([good, wrong, excused])
    assert report is not None
    assert "1 of 3 generations differ; the first is number 1, at token 4" in report
