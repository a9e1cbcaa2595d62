import pytest

from penstock.core.errors import IntegrityError
from penstock.engine.step import RunnerOutput
from penstock.execution.runner.rank_messages import Failed
from penstock.execution.runner.step_ledger import PARTIAL_FAILURE_S, StepFailedError, StepLedger


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def output(**tokens: int) -> RunnerOutput:
    return RunnerOutput(0, sampled_token_ids={key: [token] for key, token in tokens.items()})


def test_a_step_is_what_the_first_rank_of_the_last_stage_says() -> None:
    ledger = StepLedger(2, 3)
    assert ledger.output_rank == 4
    first, second = ledger.open(), ledger.open()
    assert (first[0], second[0]) == (0, 1)
    ledger.finished(0, output(a=1))
    assert first[1].result(0).sampled_token_ids == {"a": [1]}
    assert not second[1].done()


def test_stages_that_do_not_sample_are_told_with_the_next_step() -> None:
    ledger = StepLedger(1, 2)
    assert [ledger.open()[2], ledger.open()[2]] == [{}, {}]
    ledger.finished(0, output(a=1, b=2))
    ledger.finished(1, output(c=3))
    assert ledger.open()[2] == {"a": [1], "b": [2], "c": [3]}
    assert ledger.open()[2] == {}
    alone = StepLedger(2, 1)
    alone.open()
    alone.finished(0, output(a=1))
    assert alone.open()[2] == {}, "ranks of one stage sample for themselves"


def test_a_step_that_all_ranks_fail_at_raises_and_the_next_goes_on() -> None:
    ledger = StepLedger(2, 1)
    (_, failing, _), (_, fine, _) = ledger.open(), ledger.open()
    ledger.failed(1, Failed(0, "MemoryError: no", False))
    assert not failing.done()
    ledger.failed(0, Failed(0, "MemoryError: no", False))
    with pytest.raises(StepFailedError, match="MemoryError: no"):
        failing.result(0)
    ledger.finished(1, output(a=1))
    assert fine.result(0).sampled_token_ids
    assert ledger.stuck() is None


def test_a_broken_invariant_stays_one() -> None:
    ledger = StepLedger(1, 1)
    _, future, _ = ledger.open()
    ledger.failed(0, Failed(0, "IntegrityError: request x is new but known", True))
    with pytest.raises(IntegrityError, match="new but known"):
        future.result(0)


def test_a_stage_that_fails_is_waited_for_by_the_last_one() -> None:
    """The stages behind it run the step with zeros, and what they say of it does not count."""
    for last_stage_first in (False, True):
        clock = Clock()
        ledger = StepLedger(2, 2, clock=clock)
        _, future, _ = ledger.open()
        ledger.failed(0, Failed(0, "RuntimeError: no", False))
        if last_stage_first:
            ledger.finished(0, output(a=1))
            assert not future.done()
            ledger.failed(1, Failed(0, "RuntimeError: no", False))
        else:
            ledger.failed(1, Failed(0, "RuntimeError: no", False))
            assert not future.done()
            clock.now += 2 * PARTIAL_FAILURE_S
            assert ledger.stuck() is None, "the last stage has a long step"
            ledger.finished(0, output(a=1))
        with pytest.raises(StepFailedError):
            future.result(0)
        assert ledger.open()[2] == {}, "tokens of a failed step are nobody's"


def test_a_failure_of_some_ranks_only_is_the_end() -> None:
    clock = Clock()
    ledger = StepLedger(2, 1, clock=clock)
    _, future, _ = ledger.open()
    ledger.failed(1, Failed(0, "MemoryError: no", False))
    clock.now += PARTIAL_FAILURE_S
    assert ledger.stuck() is None
    clock.now += 0.1
    reason = ledger.stuck()
    assert reason is not None
    assert reason == "rank 1 failed at a step and others did not: MemoryError: no"
    ledger.close(reason)
    with pytest.raises(IntegrityError, match="rank 1 failed"):
        future.result(0)
    ledger.close("too late")
    with pytest.raises(IntegrityError, match="rank 1 failed"):
        ledger.open()


def test_what_was_answered_cannot_be_taken_back() -> None:
    ledger = StepLedger(2, 1)
    ledger.open()
    ledger.finished(0, output(a=1))
    with pytest.raises(IntegrityError, match="step 0, which is over: MemoryError"):
        ledger.failed(1, Failed(0, "MemoryError", False))
    with pytest.raises(IntegrityError, match="answered twice"):
        ledger.finished(0, output(a=1))
