"""The draft model beside a runner, by what it computes and when."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.engine.step import BlockMove, CachedRequest, NewRequest, RunnerOutput
from penstock.execution.models.registry import LoadedModel
from tests.execution.runner.harness import Harness, WatchedModel, new_request, solo_tokens
from tests.execution.runner.proposers import draft_model

SAMPLED = SamplingParams(temperature=0.9, top_p=0.9)
A, B, C = [5, 6, 7, 8, 9], list(range(20, 31)), [100, 101]


class Drafting:
    """A harness with a draft model, by default the model itself, so that right drafts are those that will be sampled; and what the draft
    model computes."""

    def __init__(
        self, loaded: LoadedModel, *, draft: LoadedModel | None = None, max_tokens: int = 64, max_model_len: int = 128
    ) -> None:
        draft = draft or loaded
        self.model = WatchedModel(draft)
        self.model.hook = self._note
        self.passes: list[list[int]] = []
        self.harness = Harness(
            loaded,
            make_proposer=draft_model(draft, max_tokens=max_tokens, max_model_len=max_model_len, model=self.model),
        )

    def _note(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        self.passes.append(input_ids.tolist())
        return hidden

    def take_passes(self) -> list[list[int]]:
        """Input ids of the draft model's passes since the last call."""
        passes, self.passes = self.passes, []
        return passes

    def start(self, *new: NewRequest, wanted: int = 3, **changes: Sequence[object]) -> RunnerOutput:
        """Compute the whole prompts of new requests and ask for drafts."""
        scheduled = {one.key: len(one.token_ids) - one.num_computed_tokens for one in new}
        step = self.harness.make_step(scheduled, new=new)
        step.num_proposals = dict.fromkeys(scheduled, wanted)
        for name, value in changes.items():
            setattr(step, name, value)
        return self.harness.runner.execute(step)

    def verify(self, key: str, length: int, drafts: Sequence[int], wanted: int = 3) -> RunnerOutput:
        """Verify drafts of a request that has `length` tokens, and ask for the next ones."""
        return self.harness.step(
            {key: 1 + len(drafts)},
            cached=[CachedRequest(key, [], length - 1)],
            draft_token_ids={key: list(drafts)} if drafts else {},
            num_proposals={key: wanted},
        )


def test_drafts_follow_each_other_in_passes_of_one_token(loaded: LoadedModel) -> None:
    plain = solo_tokens(loaded, B, 9, SAMPLED, seed=4)
    drafting = Drafting(loaded)
    output = drafting.start(new_request("a", B, range(8), SAMPLED, seed=4))
    assert output.draft_token_ids == {"a": plain[1:4]}
    assert drafting.take_passes() == [[*B, plain[0]], [plain[1]], [plain[2]]]
    # All three are right: the last of them was proposed without being computed.
    output = drafting.verify("a", 12, plain[1:4])
    assert (output.sampled_token_ids, output.draft_token_ids) == ({"a": plain[1:5]}, {"a": plain[5:8]})
    assert drafting.take_passes() == [[plain[3], plain[4]], [plain[5]], [plain[6]]]
    # What was computed for drafts that are refused is forgotten.
    output = drafting.verify("a", 16, [plain[5], 0, 0], wanted=1)
    assert (output.sampled_token_ids, output.draft_token_ids) == ({"a": plain[5:7]}, {"a": plain[7:8]})
    assert drafting.take_passes() == [[plain[6]]]


def test_drafts_that_nobody_verified_are_of_use_all_the_same(loaded: LoadedModel) -> None:
    plain = solo_tokens(loaded, B, 5)
    drafting = Drafting(loaded)
    drafting.start(new_request("a", B, range(8)))
    drafting.take_passes()
    # The newest token is computed again, because nobody has kept what it gave.
    output = drafting.verify("a", 12, [])
    assert output.draft_token_ids == {"a": plain[2:5]}
    assert drafting.take_passes() == [[plain[1]], [plain[2]], [plain[3]]]


def test_requests_of_one_call_want_different_numbers(loaded: LoadedModel) -> None:
    drafting = Drafting(loaded)
    a, b = new_request("a", A, [1, 2, 3, 4]), new_request("b", B, [5, 6, 7, 8], SAMPLED, seed=1)
    output = drafting.harness.step({"a": 5, "b": 11}, new=[a, b], num_proposals={"a": 1, "b": 4})
    assert output.draft_token_ids == {
        "a": solo_tokens(loaded, A, 2)[1:],
        "b": solo_tokens(loaded, B, 5, SAMPLED, seed=1)[1:],
    }
    assert [len(one) for one in drafting.take_passes()] == [18, 1, 1, 1]


def test_a_long_prompt_is_caught_up_in_parts_and_delays_nobody(loaded: LoadedModel) -> None:
    drafting = Drafting(loaded, max_tokens=8)
    plain_a, plain_b = solo_tokens(loaded, A, 5), solo_tokens(loaded, B, 4)
    output = drafting.start(new_request("a", A, [1, 2, 3, 4]), new_request("b", B, [5, 6, 7, 8]), wanted=1)
    assert output.draft_token_ids == {"a": plain_a[1:2]}
    assert drafting.take_passes() == [[*A, plain_a[0], 20, 21]]
    cached = [CachedRequest("a", [], 5), CachedRequest("b", [], 11)]
    output = drafting.harness.step({"a": 1, "b": 1}, cached=cached, num_proposals={"b": 1, "a": 1})
    assert output.draft_token_ids == {"a": plain_a[2:3]}
    assert drafting.take_passes() == [[plain_a[1], *range(22, 29)]]
    cached = [CachedRequest("a", [], 6), CachedRequest("b", [], 12)]
    output = drafting.harness.step({"a": 1, "b": 1}, cached=cached, num_proposals={"b": 1, "a": 1})
    assert output.draft_token_ids == {"a": plain_a[3:4], "b": plain_b[3:4]}
    assert drafting.take_passes() == [[plain_a[2], 29, 30, *plain_b[:3]]]


def test_blocks_from_the_prefix_cache_are_not_computed_again(loaded: LoadedModel) -> None:
    drafting = Drafting(loaded)
    first = drafting.start(new_request("a", B, [1, 2, 3, 4])).sampled_token_ids["a"]
    drafting.take_passes()
    # Another request finds two blocks there, and gets a copy of the third, which is not full.
    fork = new_request("b", B, [1, 2, 9, 10], SAMPLED, num_computed_tokens=10, seed=2)
    output = drafting.start(fork, block_copies=[BlockMove(3, 9)])
    assert output.draft_token_ids == {"b": solo_tokens(loaded, B, 4, SAMPLED, seed=2)[1:]}
    assert drafting.take_passes()[0] == [*B[8:], *output.sampled_token_ids["b"]]
    first += drafting.harness.decode({"a": 12}, 1)["a"]
    # The blocks stay what they are when both are gone, and a block that is filled with other tokens is other tokens.
    drafting.harness.step({}, finished_keys=["a", "b"])
    prompt = [*B, *first[:1], 60]
    again = drafting.start(new_request("c", prompt, [1, 2, 3, 11, 12], num_computed_tokens=12))
    assert again.draft_token_ids == {"c": solo_tokens(loaded, prompt, 4)[1:]}
    assert drafting.take_passes()[0] == [60, *again.sampled_token_ids["c"]]
    # A block that was filled with other tokens is these other tokens.
    drafting.harness.step({}, finished_keys=["c"])
    drafting.start(new_request("d", A, [1, 13, 14]))
    prompt = [*A[:4], 80, 81]
    other = drafting.start(new_request("e", prompt, [1, 15, 16], num_computed_tokens=4))
    assert other.draft_token_ids == {"e": solo_tokens(loaded, prompt, 4)[1:]}


def test_a_block_of_somebody_else_is_not_valid(loaded: LoadedModel) -> None:
    """The large model found the prefix; the draft model never computed it."""
    drafting = Drafting(loaded)
    drafting.harness.step({"a": 11}, new=[new_request("a", B, [1, 2, 3])])
    output = drafting.start(new_request("b", B, [1, 2, 9, 10], num_computed_tokens=8))
    assert output.draft_token_ids == {"b": solo_tokens(loaded, B, 4)[1:]}
    assert drafting.take_passes()[0] == [*B, *output.sampled_token_ids["b"]]
    drafting.harness.step({}, finished_keys=["a", "b"])
    # A request is given blocks that were valid and wants no drafts; another finds its tokens there.
    drafting.harness.step({"x": 11}, new=[new_request("x", A + A + C[:1], [1, 2, 9])])
    drafting.harness.step({}, finished_keys=["x"])
    drafting.take_passes()
    prompt = [*A, *A[:3], 60]
    new = new_request("y", prompt, [1, 2, 3, 10], num_computed_tokens=8)
    assert drafting.start(new).draft_token_ids == {"y": solo_tokens(loaded, prompt, 4)[1:]}
    assert drafting.take_passes()[0] == [*prompt, *solo_tokens(loaded, prompt, 1)]
    drafting.harness.step({}, finished_keys=["y"])
    # A request grows into the second of them while it wants no drafts. Others find its tokens: the first two blocks, then that one too.
    tokens = [50, 51, 52, 53, 54, 55]
    tokens += drafting.start(new_request("c", tokens, [11, 12]), wanted=1).sampled_token_ids["c"]
    for step in range(6):
        output = drafting.harness.step({"c": 1}, cached=[CachedRequest("c", [2] if step == 1 else [], 6 + step)])
        tokens += output.sampled_token_ids["c"]
    drafting.take_passes()
    for key, found, computed in (("d", [11, 12], 4), ("e", [11, 12, 2], 8)):
        prompt = [*tokens[: 4 * len(found)], 60]
        new = new_request(key, prompt, [*found, 30, 31], num_computed_tokens=4 * len(found))
        output = drafting.start(new, finished_keys=["d"] if key == "e" else [])
        assert output.draft_token_ids == {key: solo_tokens(loaded, prompt, 4)[1:]}
        assert drafting.take_passes()[0] == [*prompt[computed:], *output.sampled_token_ids[key]]


def test_a_copy_of_a_whole_block_is_not_valid(loaded: LoadedModel) -> None:
    """Only the large model's half of it is copied, over what the draft model computed for somebody else."""
    drafting = Drafting(loaded)
    drafting.start(new_request("a", B, [1, 2, 3, 4]), new_request("other", A, [5, 6, 7]))
    drafting.harness.step({}, finished_keys=["other"])
    drafting.take_passes()
    output = drafting.start(new_request("b", B, [1, 5, 8, 9], num_computed_tokens=8), block_copies=[BlockMove(2, 5)])
    assert output.draft_token_ids == {"b": solo_tokens(loaded, B, 4)[1:]}
    assert drafting.take_passes()[0] == [*B[4:], *output.sampled_token_ids["b"]]


def test_blocks_come_back_from_the_host_tier(loaded: LoadedModel) -> None:
    drafting = Drafting(loaded)
    drafting.start(new_request("a", B, [1, 2, 3, 4]))
    # Other tokens take the blocks in the step in which they leave; only the first of them was ever computed by the draft model.
    drafting.harness.step({"x": 4}, new=[new_request("x", A, [7, 8])])
    moves = [BlockMove(1, 5), BlockMove(2, 6), BlockMove(7, 7)]
    drafting.start(new_request("y", C * 4, [1, 2, 30]), finished_keys=["a"], preempted_keys=["x"], swap_outs=moves)
    drafting.take_passes()
    back = [BlockMove(5, 20), BlockMove(6, 21)]
    output = drafting.start(new_request("b", B, [20, 21, 22, 23], num_computed_tokens=8), swap_ins=back)
    assert output.draft_token_ids == {"b": solo_tokens(loaded, B, 4)[1:]}
    assert drafting.take_passes()[0] == [*B[8:], *output.sampled_token_ids["b"]]
    output = drafting.start(new_request("z", A, [24, 25, 26], num_computed_tokens=4), swap_ins=[BlockMove(7, 24)])
    assert output.draft_token_ids == {"z": solo_tokens(loaded, A, 4)[1:]}
    assert drafting.take_passes()[0] == [*A, *output.sampled_token_ids["z"]]


@pytest.mark.parametrize(
    ("num_blocks", "max_model_len", "expected"), [(3, 128, 0), (4, 128, 3), (4, 13, 2), (4, 12, 1), (4, 11, 0)]
)
def test_there_are_no_drafts_without_blocks_or_context(
    loaded: LoadedModel, num_blocks: int, max_model_len: int, expected: int
) -> None:
    """A prompt of 11 tokens and the one that follows fill three blocks. What the draft model computes has to be in its context; the last
    draft is not computed by it."""
    drafting = Drafting(loaded, max_model_len=max_model_len)
    output = drafting.start(new_request("a", B, range(num_blocks)), wanted=3)
    plain = solo_tokens(loaded, B, 4)
    assert output.draft_token_ids == ({"a": plain[1 : 1 + expected]} if expected else {})
    assert len(drafting.take_passes()) == expected


def test_an_error_in_a_pass_costs_drafts_and_nothing_else(loaded: LoadedModel) -> None:
    drafting = Drafting(loaded)
    plain = solo_tokens(loaded, B, 8)
    note = drafting.model.hook

    def fail_in_the_second_pass(input_ids: Tensor, hidden: Tensor) -> Tensor:
        if len(drafting.passes) == 1:
            raise torch.OutOfMemoryError("injected")
        return note(input_ids, hidden)

    drafting.model.hook = fail_in_the_second_pass
    output = drafting.start(new_request("a", B, range(8)))
    assert (output.sampled_token_ids, output.draft_token_ids) == ({"a": plain[:1]}, {})
    drafting.model.hook = note
    drafting.take_passes()
    output = drafting.verify("a", 12, [])
    assert (output.sampled_token_ids, output.draft_token_ids) == ({"a": plain[1:2]}, {"a": plain[2:5]})
    assert drafting.take_passes()[0] == [plain[1]]


def test_wrong_guesses_are_computed_again(loaded: LoadedModel, draft: LoadedModel) -> None:
    """Two steps later, so that the token that a wrong guess stood for is not the newest one, which is computed in any case."""
    drafting = Drafting(loaded, draft=draft)
    plain = solo_tokens(loaded, B, 3)
    guesses = drafting.start(new_request("a", B, range(8))).draft_token_ids["a"]
    assert guesses[0] != plain[1]
    drafting.harness.decode({"a": 12}, 1)
    drafting.take_passes()
    drafting.verify("a", 13, [])
    assert drafting.take_passes()[0] == plain[1:3]
