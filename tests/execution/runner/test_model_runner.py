import pytest
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.core.types import SamplingParams, TokenLogprobs
from penstock.engine.step import BlockMove, CachedRequest
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.outputs import NO_DISTRIBUTION
from tests.execution.runner.device_harness import DeviceHarness
from tests.execution.runner.harness import Harness, new_request, solo_logits, solo_tokens

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, frequency_penalty=0.4, min_tokens=4)
A, B, C = [5, 6, 7, 8, 9], list(range(20, 31)), [100, 101]


@pytest.fixture(params=[Harness, DeviceHarness], ids=["host", "device"])
def harness(request: pytest.FixtureRequest, loaded: LoadedModel) -> Harness:
    """What holds for one runner holds for the other, whose launches are waited for here."""
    made: Harness = request.param(loaded)
    return made


def test_a_mixed_batch_with_chunks_equals_solo_runs(harness: Harness, loaded: LoadedModel) -> None:
    a: list[int] = []
    b: list[int] = []
    c: list[int] = []
    output = harness.step({"a": 5}, new=[new_request("a", A, [9, 2])])
    a += output.sampled_token_ids["a"]
    # a decodes while b's prompt comes in pieces of 4, 1 and 6 tokens.
    output = harness.step(
        {"a": 1, "b": 4}, new=[new_request("b", B, [7], SAMPLED, seed=3)], cached=[CachedRequest("a", [], 5)]
    )
    assert "b" not in output.sampled_token_ids
    a += output.sampled_token_ids["a"]
    output = harness.step({"a": 1, "b": 1}, cached=[CachedRequest("a", [], 6), CachedRequest("b", [4], 4)])
    assert "b" not in output.sampled_token_ids
    a += output.sampled_token_ids["a"]
    # c arrives in the step in which b ends its prompt; a is not scheduled.
    output = harness.step(
        {"c": 2, "b": 6}, new=[new_request("c", C, [1, 30, 31])], cached=[CachedRequest("b", [0, 11], 5)]
    )
    assert output.sampled_token_ids.keys() == {"b", "c"}
    b += output.sampled_token_ids["b"]
    c += output.sampled_token_ids["c"]
    for step in range(6):
        output = harness.step(
            {"c": 1, "b": 1, "a": 1},
            cached=[
                CachedRequest("a", [12, 13] if step == 0 else [], 7 + step),
                CachedRequest("b", [14] if step == 1 else [], 11 + step),
                CachedRequest("c", [], 2 + step),
            ],
        )
        a += output.sampled_token_ids["a"]
        b += output.sampled_token_ids["b"]
        c += output.sampled_token_ids["c"]
    assert a == solo_tokens(loaded, A, 9)
    assert b == solo_tokens(loaded, B, 7, SAMPLED, seed=3)
    assert c == solo_tokens(loaded, C, 7)


def test_copy_on_write_leaves_the_source_alone(harness: Harness, loaded: LoadedModel) -> None:
    harness.step({"a": 11}, new=[new_request("a", B, [3, 4, 5, 6], SAMPLED, seed=1)])
    # A second sample shares the two full blocks and gets a copy of the third; its last prompt token is computed anew.
    fork = new_request("b", B, [3, 4, 8, 9], SAMPLED, seed=2, num_computed_tokens=10)
    output = harness.step(
        {"a": 1, "b": 1}, new=[fork], cached=[CachedRequest("a", [], 11)], block_copies=[BlockMove(5, 8)]
    )
    rest = harness.decode({"a": 13, "b": 12}, 4)
    assert output.sampled_token_ids["a"] + rest["a"] == solo_tokens(loaded, B, 6, SAMPLED, seed=1)[1:]
    assert output.sampled_token_ids["b"] + rest["b"] == solo_tokens(loaded, B, 5, SAMPLED, seed=2)


def test_blocks_survive_the_way_to_the_host_and_back(harness: Harness, loaded: LoadedModel) -> None:
    expected = solo_tokens(loaded, B, 4, SAMPLED, seed=1)
    first = harness.step({"a": 11}, new=[new_request("a", B, [3, 4, 5], SAMPLED, seed=1)]).sampled_token_ids["a"]
    # The blocks leave for the host in the same step in which another request overwrites them.
    other = new_request("other", A, [3, 4])
    harness.step({"other": 5}, new=[other], preempted_keys=["a"], swap_outs=[BlockMove(3, 6), BlockMove(4, 0)])
    again = new_request("a", B + first, [20, 21, 22, 23], SAMPLED, num_prompt_tokens=11, num_computed_tokens=8, seed=1)
    output = harness.step({"a": 4}, new=[again], swap_ins=[BlockMove(6, 20), BlockMove(0, 21)])
    assert first + output.sampled_token_ids["a"] + harness.decode({"a": 13}, 2)["a"] == expected


@pytest.mark.parametrize("chunks", [[11], [1, 10], [4, 4, 3], [10, 1], [1] * 11])
def test_prompt_logprobs_across_chunks(harness: Harness, loaded: LoadedModel, chunks: list[int]) -> None:
    params = SamplingParams(temperature=0.0, prompt_logprobs=3)
    expected = torch.log_softmax(solo_logits(loaded, B), dim=1)
    found: dict[int, TokenLogprobs] = {}
    computed = 0
    for number, count in enumerate(chunks):
        new = [new_request("a", B, [3, 4, 5], params), new_request("b", A, [6, 7])] if number == 0 else []
        scheduled = {"a": count, "b": 5} if number == 0 else {"a": count}
        output = harness.step(scheduled, new=new, cached=[] if number == 0 else [CachedRequest("a", [], computed)])
        assert "b" not in output.prompt_logprobs
        computed += count
        if "a" in output.prompt_logprobs:
            first, entries = output.prompt_logprobs["a"]
            assert first == (max(found) + 1 if found else 1)
            found |= {first + offset: entry for offset, entry in enumerate(entries)}
    assert sorted(found) == list(range(1, 11))
    for position, entry in found.items():
        row = expected[position - 1]
        assert entry.token_id == B[position]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        assert [token_id for token_id, _ in entry.top] == row.topk(3).indices.tolist()


def test_prompt_logprobs_from_a_position_on(harness: Harness, loaded: LoadedModel) -> None:
    """A request that was preempted wants only what it has not been told."""
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    again = new_request("a", [*B, 50, 51], [3, 4, 5, 6], params, num_prompt_tokens=11, prompt_logprobs_start=6)
    output = harness.step({"a": 13}, new=[again])
    first, entries = output.prompt_logprobs["a"]
    assert (first, [entry.token_id for entry in entries]) == (6, B[6:])
    assert all(entry.top == [] for entry in entries)


def test_logprobs_of_sampled_tokens(harness: Harness, loaded: LoadedModel) -> None:
    params = SamplingParams(temperature=0.0, logprobs=2)
    output = harness.step({"a": 5, "b": 11}, new=[new_request("a", A, [1, 2]), new_request("b", B, [3, 4, 5], params)])
    assert output.logprobs.keys() == {"b"}
    expected = torch.log_softmax(solo_logits(loaded, B)[-1], dim=0)
    (entry,) = output.logprobs["b"]
    assert entry.token_id == output.sampled_token_ids["b"][0] == int(expected.argmax())
    assert entry.rank == 1
    assert [token_id for token_id, _ in entry.top] == expected.topk(2).indices.tolist()
    assert entry.logprob == pytest.approx(float(expected.max()), abs=1e-4)


def test_a_step_that_raises_leaves_the_other_requests_right(harness: Harness, loaded: LoadedModel) -> None:
    harness.step({"a": 5}, new=[new_request("a", A, [1, 2, 10])])

    def fail(input_ids: Tensor, hidden: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    harness.model.hook = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        harness.step({"b": 4, "c": 2}, new=[new_request("b", B, [3]), new_request("c", C, [6, 7])])
    harness.model.hook = lambda input_ids, hidden: hidden
    # A step that was in flight behind it: b and c are left out, a goes on.
    output = harness.step(
        {"a": 1, "c": 1, "b": 7},
        cached=[CachedRequest("a", [], 5), CachedRequest("b", [4, 5], 4), CachedRequest("c", [], 2)],
    )
    assert output.sampled_token_ids == {"a": solo_tokens(loaded, A, 2)[1:]}
    assert not output.errors
    # Then they come again as new ones.
    output = harness.step(
        {"a": 1, "c": 2, "b": 11},
        new=[new_request("b", B, [20, 21, 22]), new_request("c", C, [23, 24])],
        cached=[CachedRequest("a", [], 6)],
        preempted_keys=["b", "c"],
    )
    assert output.sampled_token_ids == {
        "a": solo_tokens(loaded, A, 3)[2:],
        "b": solo_tokens(loaded, B, 1),
        "c": solo_tokens(loaded, C, 1),
    }
    assert len(harness.batch) == 3


def test_a_step_that_raises_before_it_knew_its_requests(harness: Harness, loaded: LoadedModel) -> None:
    with pytest.raises(IntegrityError):
        harness.step({"x": 1, "b": 4}, new=[new_request("b", B, [3])], cached=[CachedRequest("x", [], 0)])
    assert harness.step({"x": 1, "b": 4}, cached=[CachedRequest("x", [], 1)]).sampled_token_ids == {}
    output = harness.step({"b": 11}, new=[new_request("b", B, [3, 4, 5])], preempted_keys=["x", "b"])
    assert output.sampled_token_ids["b"] == solo_tokens(loaded, B, 1)
    assert len(harness.batch) == 1


def test_a_request_without_a_distribution_fails_alone(harness: Harness, loaded: LoadedModel) -> None:
    harness.step({"a": 5, "b": 11}, new=[new_request("a", A, [1, 2, 10]), new_request("b", B, [3, 4, 5, 6])])

    def poison_first(input_ids: Tensor, hidden: Tensor) -> Tensor:
        hidden[0] = torch.nan
        return hidden

    harness.model.hook = poison_first
    output = harness.step({"a": 1, "b": 1}, cached=[CachedRequest("a", [], 5), CachedRequest("b", [], 11)])
    assert output.errors == {"a": NO_DISTRIBUTION}
    assert output.sampled_token_ids == {"b": solo_tokens(loaded, B, 2)[1:]}
    harness.model.hook = lambda input_ids, hidden: hidden
    # The step in flight behind it does not know yet.
    output = harness.step({"a": 1, "b": 1}, cached=[CachedRequest("a", [], 6), CachedRequest("b", [], 12)])
    assert output.sampled_token_ids == {"b": solo_tokens(loaded, B, 3)[2:]}


def test_a_preempted_request_goes_on_with_the_same_tokens(harness: Harness, loaded: LoadedModel) -> None:
    expected = solo_tokens(loaded, A, 8, SAMPLED, seed=77)
    first = harness.step({"a": 5}, new=[new_request("a", A, [1, 2, 3], SAMPLED, seed=77)]).sampled_token_ids["a"]
    first += harness.decode({"a": 6}, 3)["a"]
    assert first == expected[:4]
    again = new_request("a", A + first, [11, 12, 13, 14], SAMPLED, num_prompt_tokens=5, seed=77)
    output = harness.step({"a": 6}, new=[again], preempted_keys=["a"])
    assert not output.sampled_token_ids
    output = harness.step({"a": 3}, cached=[CachedRequest("a", [], 6)])
    assert first + output.sampled_token_ids["a"] + harness.decode({"a": 10}, 3)["a"] == expected


def test_says_what_the_parts_of_a_step_took(harness: Harness, loaded: LoadedModel) -> None:
    output = harness.step({"a": 5}, new=[new_request("a", A, [1, 2, 10])])
    assert min(output.prepare_seconds, output.forward_seconds, output.sample_seconds) > 0
