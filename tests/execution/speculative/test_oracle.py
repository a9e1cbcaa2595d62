import numpy as np
import numpy.typing as npt
import pytest

from penstock.core.types import SamplingParams
from penstock.execution.speculative.oracle import OracleProposer, recorded_answers
from penstock.execution.speculative.proposer import IntArray, Moves

PROMPT, ANSWER = (5, 6, 7), list(range(10, 1010))
PARAMS = SamplingParams()


class Growing:
    """One sequence that grows."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = list(tokens)

    def token_ids(self, slot: int) -> npt.NDArray[np.int32]:
        return np.array(self.tokens, dtype=np.int32)

    def block_ids(self, slot: int) -> npt.NDArray[np.int32]:
        return np.zeros(0, dtype=np.int32)


class Worker:
    """A proposer that counts what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def add(self, slot: int, num_computed_tokens: int, params: SamplingParams) -> None:
        self.calls.append("add")

    def remove(self, slot: int) -> None:
        self.calls.append("remove")

    def move_blocks(self, swap_outs: Moves, swap_ins: Moves, copies: Moves) -> None:
        self.calls.append("move_blocks")

    def add_blocks(self, slot: int, block_ids: npt.NDArray[np.int32]) -> None:
        self.calls.append("add_blocks")

    def propose(self, slots: IntArray, counts: IntArray) -> list[list[int]]:
        self.calls.append("propose")
        return [[0]] * len(slots)


def oracle(acceptance: float, tokens: tuple[int, ...] = PROMPT, stand_in: Worker | None = None) -> OracleProposer:
    return OracleProposer(
        Growing(tokens), recorded_answers({PROMPT: ANSWER}), acceptance=acceptance, vocab_size=2000, stand_in=stand_in
    )


def drafts(proposer: OracleProposer, count: int) -> list[int]:
    (found,) = proposer.propose(np.array([0]), np.array([count]))
    return found


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_drafts_are_right_as_often_as_they_should(acceptance: float) -> None:
    proposer = oracle(acceptance)
    proposer.add(0, 0, PARAMS)
    found = drafts(proposer, 1000)
    right = sum(draft == token for draft, token in zip(found, ANSWER, strict=True))
    assert right / 1000 == pytest.approx(acceptance, abs=0.05 if 0 < acceptance < 1 else 0)
    # The same for the same requests.
    again = oracle(acceptance)
    again.add(0, 0, PARAMS)
    assert drafts(again, 1000) == found


def test_drafts_begin_behind_what_there_is_and_end_with_the_answer() -> None:
    proposer = oracle(1.0, (*PROMPT, *ANSWER[:996]))
    proposer.add(0, 0, PARAMS)
    assert drafts(proposer, 3) == ANSWER[996:999]
    assert drafts(proposer, 9) == ANSWER[996:]
    stranger = oracle(1.0, (1, 2, 3))
    stranger.add(0, 0, PARAMS)
    assert drafts(stranger, 3) == []


def test_a_stand_in_does_the_work() -> None:
    worker = Worker()
    proposer = oracle(1.0, stand_in=worker)
    proposer.move_blocks([], [], [])
    proposer.add(0, 0, PARAMS)
    proposer.add_blocks(0, np.array([1], dtype=np.int32))
    assert drafts(proposer, 2) == ANSWER[:2]
    proposer.remove(0)
    assert worker.calls == ["move_blocks", "add", "add_blocks", "propose", "remove"]
