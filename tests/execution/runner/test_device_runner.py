"""What is different when results are taken later. What a runner does with a single step is tested in test_model_runner.py, and
whole engines in test_overlapping_steps.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.core.types import SamplingParams
from penstock.engine.executor import StepHandle
from penstock.engine.step import BlockMove, CachedRequest, SchedulerOutput
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.accelerator import HostAccelerator
from penstock.execution.runner.outputs import NO_DISTRIBUTION
from tests.execution.runner.device_harness import DeviceHarness
from tests.execution.runner.harness import Harness, new_request, solo_tokens
from tests.execution.runner.proposers import draft_model

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, frequency_penalty=0.4, min_tokens=4)
A, B = [5, 6, 7, 8, 9], list(range(20, 31))


def poison_rows(rows: list[bool]) -> Callable[[Tensor, Tensor], Tensor]:
    def poison(input_ids: Tensor, hidden: Tensor) -> Tensor:
        hidden[torch.tensor(rows)] = torch.nan
        return hidden

    return poison


def decode_step(harness: Harness, key: str, position: int) -> SchedulerOutput:
    return harness.make_step({key: 1}, cached=[CachedRequest(key, [], position)])


def test_a_step_starts_from_a_token_that_the_host_does_not_know(loaded: LoadedModel) -> None:
    harness = DeviceHarness(loaded, max_inflight=3)
    runner = harness.device_runner
    first = runner.launch(harness.make_step({"a": 5}, new=[new_request("a", A, [9, 2, 4])]))
    second = runner.launch(decode_step(harness, "a", 5))
    third = runner.launch(decode_step(harness, "a", 6))
    assert not first.done()
    tokens = []
    for handle in (first, second, third):
        output = handle.result()
        assert handle.done()
        tokens += output.sampled_token_ids["a"]
    assert tokens == solo_tokens(loaded, A, 3)
    assert harness.batch.token_ids(harness.batch.request("a").slot).tolist() == A + tokens


def test_no_more_steps_than_there_are_buffers(loaded: LoadedModel) -> None:
    harness = DeviceHarness(loaded)
    runner = harness.device_runner
    handles = [runner.launch(harness.make_step({"a": 5}, new=[new_request("a", A, [9, 2, 4])]))]
    handles.append(runner.launch(decode_step(harness, "a", 5)))
    with pytest.raises(IntegrityError, match="in flight"):
        runner.launch(decode_step(harness, "a", 6)).result()
    assert [handle.result().sampled_token_ids["a"] for handle in handles] == [[t] for t in solo_tokens(loaded, A, 2)]


def test_a_request_that_fails_alone_with_a_step_behind_it(loaded: LoadedModel) -> None:
    harness = DeviceHarness(loaded)
    runner = harness.device_runner
    harness.step({"a": 5, "b": 11}, new=[new_request("a", A, [1, 2, 10]), new_request("b", B, [3, 4, 5, 6])])

    def step(position: int) -> StepHandle:
        cached = [CachedRequest("a", [], 5 + position), CachedRequest("b", [], 11 + position)]
        return runner.launch(harness.make_step({"a": 1, "b": 1}, cached=cached))

    harness.model.hook = poison_rows([True, False])
    failing = step(0)
    harness.model.hook = lambda input_ids, hidden: hidden
    behind = step(1)
    expected = solo_tokens(loaded, B, 4)
    output = failing.result()
    assert (output.errors, output.sampled_token_ids) == ({"a": NO_DISTRIBUTION}, {"b": expected[1:2]})
    # Known by now: a is left out, and the step behind says nothing of it.
    later = step(2)
    output = behind.result()
    assert (output.errors, output.sampled_token_ids) == ({}, {"b": expected[2:3]})
    output = later.result()
    assert (output.errors, output.sampled_token_ids) == ({}, {"b": expected[3:4]})


@pytest.mark.parametrize("fails", [False, True])
def test_a_slot_that_changes_hands_while_its_token_is_on_the_way(loaded: LoadedModel, fails: bool) -> None:
    """The request ended, and another with the same name has its slot and blocks, before the result of its last step was taken."""
    harness = DeviceHarness(loaded, max_slots=1)
    runner = harness.device_runner
    harness.model.hook = poison_rows([False] * 4 + [fails])
    old = runner.launch(harness.make_step({"a": 5}, new=[new_request("a", A, [1, 2])]))
    harness.model.hook = lambda input_ids, hidden: hidden
    again = new_request("a", B, [1, 2, 3, 4])
    new = runner.launch(harness.make_step({"a": 11}, new=[again], finished_keys=["a"]))
    output = old.result()
    assert output.errors == ({"a": NO_DISTRIBUTION} if fails else {})
    assert output.sampled_token_ids == ({} if fails else {"a": solo_tokens(loaded, A, 1)})
    assert new.result().sampled_token_ids["a"] == solo_tokens(loaded, B, 1)
    assert harness.decode({"a": 12}, 2)["a"] == solo_tokens(loaded, B, 3)[1:]
    assert harness.batch.token_ids(0).tolist() == B + solo_tokens(loaded, B, 3)


def test_nothing_is_proposed_for_who_has_left_meanwhile(loaded: LoadedModel) -> None:
    """Another request with the same name, in the same slot, is not meant."""
    harness = DeviceHarness(loaded, max_slots=2, max_drafts=2, make_proposer=draft_model(loaded))
    runner = harness.device_runner
    new = [new_request("a", A, [1, 2]), new_request("b", B[:3], [3, 4])]
    first = runner.launch(harness.make_step({"a": 5, "b": 3}, new=new, num_proposals={"a": 2, "b": 2}))
    again = new_request("a", B, [5, 6, 7, 8])
    second = runner.launch(
        harness.make_step({"a": 11}, new=[again], finished_keys=["a"], num_proposals={"a": 2}),
    )
    expected = solo_tokens(loaded, B[:3], 4)
    output = first.result()
    assert output.sampled_token_ids == {"a": solo_tokens(loaded, A, 1), "b": expected[:1]}
    assert output.draft_token_ids == {"b": expected[1:3]}
    assert second.result().draft_token_ids == {"a": solo_tokens(loaded, B, 3)[1:]}
    # The device is told what the drafts were, and keeps what became of them.
    step = harness.make_step(
        {"b": 3}, cached=[CachedRequest("b", [], 3)], draft_token_ids={"b": [expected[1], expected[2] + 1]}
    )
    assert runner.launch(step).result().sampled_token_ids == {"b": expected[1:3]}
    assert runner.launch(decode_step(harness, "b", 5)).result().sampled_token_ids == {"b": expected[3:]}


def test_a_launch_that_fails_between_two_that_do_not(loaded: LoadedModel) -> None:
    harness = DeviceHarness(loaded)
    runner = harness.device_runner
    handles = [runner.launch(harness.make_step({"a": 5}, new=[new_request("a", A, [1, 2, 10])]))]

    def fail(input_ids: Tensor, hidden: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    harness.model.hook = fail
    failed = runner.launch(harness.make_step({"b": 4}, new=[new_request("b", B, [3])]))
    harness.model.hook = lambda input_ids, hidden: hidden
    cached = [CachedRequest("a", [], 5), CachedRequest("b", [4, 5], 4)]
    handles.append(runner.launch(harness.make_step({"a": 1, "b": 7}, cached=cached)))
    expected = solo_tokens(loaded, A, 2)
    assert handles[0].result().sampled_token_ids == {"a": expected[:1]}
    assert failed.done()
    with pytest.raises(torch.OutOfMemoryError):
        failed.result()
    assert handles[1].result().sampled_token_ids == {"a": expected[1:]}


class LostAccelerator(HostAccelerator):
    """A GPU after a fault: every call fails, for ever."""

    lost = False

    def is_lost(self) -> bool:
        return self.lost or super().is_lost()


@pytest.mark.parametrize("lost", [False, True])
def test_an_error_that_stays_ends_the_engine(loaded: LoadedModel, lost: bool) -> None:
    harness = DeviceHarness(loaded)
    accelerator = LostAccelerator()
    accelerator.lost = lost
    harness.device_runner._accelerator = accelerator

    def fail(input_ids: Tensor, hidden: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    harness.model.hook = fail
    with pytest.raises(IntegrityError if lost else RuntimeError, match="illegal memory access") as raised:
        harness.step({"a": 5}, new=[new_request("a", A, [1, 2])])
    assert isinstance(raised.value, IntegrityError) == lost


def test_blocks_that_leave_for_the_host_are_those_that_the_step_before_wrote(loaded: LoadedModel) -> None:
    harness = DeviceHarness(loaded)
    runner = harness.device_runner
    expected = solo_tokens(loaded, B, 3, SAMPLED, seed=1)
    first = runner.launch(harness.make_step({"a": 11}, new=[new_request("a", B, [3, 4, 5], SAMPLED, seed=1)]))
    # Behind it, another request takes the blocks over.
    moves = [BlockMove(3, 6), BlockMove(4, 0)]
    other = new_request("other", A, [3, 4])
    second = runner.launch(harness.make_step({"other": 5}, new=[other], preempted_keys=["a"], swap_outs=moves))
    tokens = first.result().sampled_token_ids["a"]
    again = new_request("a", B + tokens, [20, 21, 22, 23], SAMPLED, num_prompt_tokens=11, num_computed_tokens=8, seed=1)
    moves = [BlockMove(6, 20), BlockMove(0, 21)]
    third = runner.launch(harness.make_step({"a": 4}, new=[again], swap_ins=moves))
    assert second.result().sampled_token_ids["other"] == solo_tokens(loaded, A, 1)
    tokens += third.result().sampled_token_ids["a"]
    assert tokens + harness.decode({"a": 13}, 1)["a"] == expected


def test_prompts_that_do_not_fit_the_staging_go_on_their_own(loaded: LoadedModel) -> None:
    harness = DeviceHarness(loaded, data_size=16)
    new = [new_request("a", A, [1, 2]), new_request("b", B, [3, 4, 5]), new_request("c", B[2:], [6, 7, 8])]
    output = harness.step({"a": 5, "b": 11, "c": 9}, new=new)
    expected = {"a": solo_tokens(loaded, A, 1), "b": solo_tokens(loaded, B, 1), "c": solo_tokens(loaded, B[2:], 1)}
    assert output.sampled_token_ids == expected


def test_times_of_a_step(loaded: LoadedModel) -> None:
    harness = DeviceHarness(loaded)
    runner = harness.device_runner
    first = runner.launch(harness.make_step({"a": 5}, new=[new_request("a", A, [9, 2, 4])]))
    second = runner.launch(decode_step(harness, "a", 5))
    outputs = [first.result(), second.result()]
    assert all(min(o.prepare_seconds, o.forward_seconds, o.sample_seconds) > 0 for o in outputs)
    assert all(o.device_seconds >= o.forward_seconds + o.sample_seconds for o in outputs)
    assert outputs[0].device_idle_seconds == 0.0 < outputs[1].device_idle_seconds


def test_recorded_steps_are_for_decodes_and_what_looks_like_them(loaded: LoadedModel) -> None:
    """A prompt that comes one token at a time is computed as decodes are, unless its log-probabilities are wanted."""
    harness = DeviceHarness(loaded, largest_graph=2)
    assert harness.graphs is not None
    asking = SamplingParams(temperature=0.0, prompt_logprobs=1)
    new = [new_request("a", A, [1, 2]), new_request("b", B[:3], [3]), new_request("c", B[:3], [4], asking)]
    assert harness.step({"a": 5}, new=new[:1]).sampled_token_ids["a"] == solo_tokens(loaded, A, 1)
    assert harness.graphs.runs == 0
    output = harness.step({"a": 1, "b": 1}, new=new[1:2], cached=[CachedRequest("a", [], 5)])
    assert output.sampled_token_ids == {"a": solo_tokens(loaded, A, 2)[1:]}
    assert harness.step({"b": 1}, cached=[CachedRequest("b", [], 1)]).sampled_token_ids == {}
    assert harness.graphs.runs == 2
    output = harness.step({"b": 1, "c": 1}, new=new[2:], cached=[CachedRequest("b", [], 2)])
    assert output.sampled_token_ids == {"b": solo_tokens(loaded, B[:3], 1)}
    first, entries = output.prompt_logprobs["c"]
    assert (first, [entry.token_id for entry in entries]) == (1, B[1:2])
    assert harness.graphs.runs == 2
