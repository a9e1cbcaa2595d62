"""A runner with drafts, driven by hand: the same tokens as without, and what it says of drafts."""

import logging

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.core.types import SamplingParams
from penstock.engine.step import BlockMove, CachedRequest, RunnerOutput
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.outputs import NO_DISTRIBUTION
from penstock.execution.speculative.proposer import IntArray, Moves
from tests.execution.runner.device_harness import DeviceHarness
from tests.execution.runner.harness import Harness, new_request, solo_logits, solo_tokens

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, logprobs=2)
PENALISED = SamplingParams(
    temperature=0.9, frequency_penalty=0.6, repetition_penalty=1.2, logit_bias={7: 2.0}, min_tokens=4
)
A, B, C = [5, 6, 7, 8, 9], list(range(20, 31)), [100, 101]


class Scripted:
    """Proposes what it is told to, and notes what it hears."""

    def __init__(self) -> None:
        self.drafts: list[list[int]] = []
        self.error: Exception | None = None
        self.heard: list[object] = []

    def add(self, slot: int, num_computed_tokens: int, params: SamplingParams) -> None:
        self.heard.append(("add", slot, num_computed_tokens))

    def remove(self, slot: int) -> None:
        self.heard.append(("remove", slot))

    def move_blocks(self, swap_outs: Moves, swap_ins: Moves, copies: Moves) -> None:
        self.heard.append(("move", list(swap_outs), list(swap_ins), list(copies)))

    def add_blocks(self, slot: int, block_ids: npt.NDArray[np.int32]) -> None:
        self.heard.append(("blocks", slot, block_ids.tolist()))

    def propose(self, slots: IntArray, counts: IntArray) -> list[list[int]]:
        if self.error is not None:
            raise self.error
        self.heard.append(("propose", slots.tolist(), counts.tolist()))
        return self.drafts


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture(params=["host", "device", "device with graphs"])
def harness(loaded: LoadedModel, scripted: Scripted, request: pytest.FixtureRequest) -> Harness:
    if request.param == "host":
        return Harness(loaded, make_proposer=lambda harness: scripted)
    largest = 8 if request.param == "device with graphs" else 0
    return DeviceHarness(
        loaded, make_proposer=lambda harness: scripted, max_drafts=4, largest_graph=largest, graph_lengths=(1, 2, 4, 6)
    )


def verify(harness: Harness, key: str, length: int, drafts: list[int]) -> RunnerOutput:
    """Verify drafts of a request that has `length` tokens."""
    return harness.step(
        {key: 1 + len(drafts)}, cached=[CachedRequest(key, [], length - 1)], draft_token_ids={key: drafts}
    )


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SAMPLED, PENALISED])
@pytest.mark.parametrize("num_right", [0, 1, 3])
def test_drafts_are_accepted_as_far_as_they_are_what_is_sampled(
    harness: Harness, loaded: LoadedModel, params: SamplingParams, num_right: int
) -> None:
    plain = solo_tokens(loaded, B, 8, params, seed=3)
    first = harness.step({"a": 11}, new=[new_request("a", B, range(8), params, seed=3)])
    assert first.sampled_token_ids == {"a": plain[:1]}
    drafts = plain[1 : 1 + num_right] + [(token + 1) % 256 for token in plain[1 + num_right : 4]]
    output = verify(harness, "a", 12, drafts)
    assert output.sampled_token_ids == {"a": plain[1 : 2 + num_right]}
    if params.logprobs is not None:
        assert [entry.token_id for entry in output.logprobs["a"]] == output.sampled_token_ids["a"]
        for position, entry in enumerate(output.logprobs["a"], start=1):
            row = torch.log_softmax(solo_logits(loaded, [*B, *plain[:position]])[-1], dim=0)
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [token_id for token_id, _ in entry.top] == row.topk(2).indices.tolist()
    # What refused drafts have left behind does not matter.
    rest = harness.decode({"a": 13 + num_right}, 3)["a"]
    assert rest == plain[2 + num_right : 5 + num_right]


def test_a_step_of_decodes_drafts_and_chunks(harness: Harness, loaded: LoadedModel) -> None:
    plain_a, plain_c = solo_tokens(loaded, A, 6), solo_tokens(loaded, C, 3, SAMPLED, seed=1)
    harness.step({"a": 5, "c": 2}, new=[new_request("a", A, [1, 2, 3]), new_request("c", C, [4, 5], SAMPLED, seed=1)])
    output = harness.step(
        {"c": 1, "a": 4, "b": 6},
        new=[new_request("b", B, [6, 7, 8])],
        cached=[CachedRequest("a", [], 5), CachedRequest("c", [], 2)],
        draft_token_ids={"a": [plain_a[1], plain_a[2], 0]},
    )
    assert output.sampled_token_ids == {"a": plain_a[1:4], "c": plain_c[1:2]}
    output = harness.step(
        {"c": 1, "a": 1, "b": 5},
        cached=[CachedRequest("a", [], 8), CachedRequest("b", [], 6), CachedRequest("c", [], 3)],
    )
    assert output.sampled_token_ids == {"a": plain_a[4:5], "b": solo_tokens(loaded, B, 1), "c": plain_c[2:3]}


def test_a_request_without_a_distribution_behind_a_draft_fails_alone(harness: Harness, loaded: LoadedModel) -> None:
    plain_a, plain_b = solo_tokens(loaded, A, 4), solo_tokens(loaded, B, 4)
    harness.step({"a": 5, "b": 11}, new=[new_request("a", A, [1, 2, 10]), new_request("b", B, [3, 4, 5, 6])])

    def poison_second(input_ids: Tensor, hidden: Tensor) -> Tensor:
        hidden[1] = torch.nan
        return hidden

    harness.model.hook = poison_second
    cached = [CachedRequest("a", [], 5), CachedRequest("b", [], 11)]
    drafts = {"a": plain_a[1:3], "b": plain_b[1:3]}
    output = harness.step({"a": 3, "b": 3}, cached=cached, draft_token_ids=drafts, num_proposals={"a": 2, "b": 2})
    assert output.errors == {"a": NO_DISTRIBUTION}
    assert output.sampled_token_ids == {"b": plain_b[1:4]}
    harness.model.hook = lambda input_ids, hidden: hidden
    # The step in flight behind it does not know yet.
    output = harness.step({"a": 3, "b": 1}, cached=[CachedRequest("b", [], 14)], draft_token_ids={"a": [1, 2]})
    assert output.sampled_token_ids.keys() == {"b"}


def test_masks_hold_for_each_position(harness: Harness, loaded: LoadedModel) -> None:
    plain = solo_tokens(loaded, A, 3)
    harness.step({"a": 5, "b": 11}, new=[new_request("a", A, [1, 2, 3]), new_request("b", B, [4, 5, 6, 7])])

    def only(*token_ids: int) -> bytes:
        return np.packbits(np.isin(np.arange(loaded.config.vocab_size), token_ids), bitorder="little").tobytes()

    everything = bytes([255]) * len(only(0))
    cached = [CachedRequest("a", [], 5), CachedRequest("b", [], 11)]
    output = harness.step(
        {"b": 1, "a": 3},
        cached=cached,
        draft_token_ids={"a": [plain[1], 99]},
        token_masks={"a": [everything, only(99), only(33, 34)]},
    )
    assert output.sampled_token_ids["a"][:2] == [plain[1], 99]
    assert output.sampled_token_ids["a"][2] in (33, 34)
    assert output.sampled_token_ids["b"] == solo_tokens(loaded, B, 2)[1:]
    output = harness.step({"b": 1, "a": 1}, cached=[], token_masks={"b": [only(12)]})
    assert output.sampled_token_ids["b"] == [12]
    with pytest.raises(IntegrityError, match="b has 2 masks for 1 tokens"):
        harness.step({"b": 1}, token_masks={"b": [only(12), only(13)]})


def test_the_proposer_hears_what_happens_and_is_asked(harness: Harness, scripted: Scripted) -> None:
    harness.step({"before": 11}, new=[new_request("before", B, [1, 2, 3])])
    harness.step({}, finished_keys=["before"])
    scripted.heard.clear()
    scripted.drafts = [[1, 2, 3], []]
    new = [
        new_request("a", B, [1, 2, 9], num_computed_tokens=8),
        new_request("b", A, [4, 5]),
        new_request("c", A, [6, 7]),
    ]
    output = harness.step({"a": 3, "b": 5, "c": 1}, new=new, num_proposals={"b": 2, "c": 4, "a": 3})
    slots = {key: harness.batch.request(key).slot for key in "abc"}
    # c's prompt is not done, so that nothing was sampled that a draft could follow; b gets no more than it may.
    assert output.draft_token_ids == {"b": [1, 2]}
    assert output.draft_seconds > 0
    assert scripted.heard == [
        *(("add", slots[key], 8 if key == "a" else 0) for key in "abc"),
        ("propose", [slots["b"], slots["a"]], [2, 3]),
    ]
    scripted.heard.clear()
    harness.step(
        {"b": 1},
        cached=[CachedRequest("b", [30, 31], 5)],
        preempted_keys=["c"],
        finished_keys=["a"],
        swap_outs=[BlockMove(6, 0)],
        block_copies=[BlockMove(4, 10)],
    )
    assert scripted.heard == [
        ("remove", slots["a"]),
        ("remove", slots["c"]),
        ("move", [(6, 0)], [], [(4, 10)]),
        ("blocks", slots["b"], [30, 31]),
    ]


def test_a_proposer_that_fails_costs_drafts_only(
    harness: Harness, scripted: Scripted, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    scripted.error = MemoryError("no room")
    with caplog.at_level(logging.ERROR):
        output = harness.step({"a": 5}, new=[new_request("a", A, [1, 2, 3])], num_proposals={"a": 2})
        again = harness.step({"a": 1}, num_proposals={"a": 2})
    plain = solo_tokens(loaded, A, 3)
    assert output.sampled_token_ids == {"a": plain[:1]}
    assert again.sampled_token_ids == {"a": plain[1:2]}
    assert not output.draft_token_ids
    assert not output.errors
    assert len(caplog.records) == 1
    scripted.error, scripted.drafts = None, [[4, 5]]
    assert harness.step({"a": 1}, num_proposals={"a": 2}).draft_token_ids == {"a": [4, 5]}
