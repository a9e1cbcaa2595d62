import numpy as np
import pytest

from penstock.core.errors import IntegrityError
from penstock.engine.step import CachedRequest
from penstock.execution.runner.batch import NewBlocks, PersistentBatch
from tests.execution.runner.harness import BLOCK_SIZE, CPU, new_request


def _batch(max_slots: int = 4) -> PersistentBatch:
    return PersistentBatch(max_slots, 32, BLOCK_SIZE, CPU)


def test_tensors_of_a_mixed_step() -> None:
    batch = _batch()
    batch.add(new_request("decode", range(10, 16), [5, 3], num_computed_tokens=5))
    batch.add(new_request("first chunk", range(20, 30), [7, 1], num_computed_tokens=0))
    batch.add(new_request("last chunk", range(40, 49), [2, 0, 6], num_computed_tokens=6))
    inputs = batch.build({"decode": 1, "last chunk": 3, "first chunk": 5})
    assert inputs is not None
    assert inputs.input_ids.tolist() == [15, 46, 47, 48, 20, 21, 22, 23, 24]
    assert inputs.positions.tolist() == [5, 6, 7, 8, 0, 1, 2, 3, 4]
    attention = inputs.attention
    assert attention.slot_mapping.tolist() == [3 * 4 + 1, 0 * 4 + 2, 0 * 4 + 3, 6 * 4, 28, 29, 30, 31, 4]
    assert attention.query_start.tolist() == attention.query_start_host.tolist() == [0, 1, 4, 9]
    assert attention.seq_lens.tolist() == attention.seq_lens_host.tolist() == [6, 9, 5]
    assert (attention.num_decodes, attention.max_seq_len) == (1, 9)
    assert attention.block_tables.shape == (3, 3)
    assert attention.block_tables[1].tolist() == [2, 0, 6]
    assert attention.block_tables[2, :2].tolist() == [7, 1]
    assert [inputs.keys[row] for row in inputs.sampling] == ["decode", "last chunk"]
    assert inputs.logit_rows.tolist() == [0, 3]
    assert inputs.sample_positions.tolist() == [6, 9]


def test_sampled_tokens_are_the_next_inputs() -> None:
    batch = _batch()
    slot = batch.add(new_request("a", [1, 2, 3], [0]))
    inputs = batch.build({"a": 3})
    assert inputs is not None
    batch.finish_step(inputs)
    batch.append(np.array([slot]), np.array([99]))
    # The scheduler does not know token 99 and has not said where to start.
    inputs = batch.build({"a": 1})
    assert inputs is not None
    assert (inputs.input_ids.tolist(), inputs.positions.tolist()) == ([99], [3])
    assert batch.token_ids(slot).tolist() == [1, 2, 3, 99]


def test_tokens_that_are_told_later_count_at_once() -> None:
    batch = _batch()
    slots = np.array([batch.add(new_request("a", [1, 2, 3], [0])), batch.add(new_request("b", [4], [1]))])
    batch.advance(slots)
    shape = batch.shape({"a": 4, "b": 1})
    assert shape is not None
    assert [shape.keys[row] for row in shape.sampling] == ["a"]
    batch.fill(slots, np.array([3, 1]), np.array([98, 99]))
    assert [batch.token_ids(slot).tolist() for slot in slots] == [[1, 2, 3, 98], [4, 99]]


def test_changes_say_which_blocks_are_new() -> None:
    batch = _batch()
    a, b = batch.add(new_request("a", range(4), [0])), batch.add(new_request("b", range(9), [1, 2, 3]))
    changes = [CachedRequest("a", [7, 8], 4), CachedRequest("b", [], 9)]
    assert batch.update(changes) == [NewBlocks(a, 1, 3)]
    assert batch.update([CachedRequest("b", [5], 9)]) == [NewBlocks(b, 3, 4)]
    assert batch.block_ids(a).tolist() == [0, 7, 8]
    assert batch.block_ids(b).tolist() == [1, 2, 3, 5]
    with pytest.raises(IntegrityError, match="x is scheduled but not known"):
        batch.update([CachedRequest("x", [], 0)])
    with pytest.raises(IntegrityError, match="a has 10 blocks"):
        batch.update([CachedRequest("a", list(range(7)), 0)])


def test_no_two_requests_are_the_same_incarnation() -> None:
    batch = _batch(max_slots=1)
    seen = set()
    for _ in range(3):
        slot = batch.add(new_request("a", [1], [0]))
        seen.add(int(batch.incarnations[slot]))
        batch.remove("a")
        assert batch.incarnations[slot] == 0
    assert len(seen) == 3


def test_a_slot_is_reused_without_a_trace() -> None:
    batch = _batch(max_slots=1)
    slot = batch.add(new_request("a", range(1, 13), [4, 5, 6]))
    with pytest.raises(IntegrityError, match="slots"):
        batch.add(new_request("b", [1], [0]))
    assert batch.remove("a") == slot
    assert batch.remove("a") is None
    assert batch.add(new_request("b", [50], [9])) == slot
    inputs = batch.build({"b": 1})
    assert inputs is not None
    assert inputs.input_ids.tolist() == [50]
    assert inputs.attention.block_tables.tolist() == [[9]]
    batch.update([CachedRequest("b", [8, 7], 0)])
    batch.append(np.array([slot]), np.array([51]))
    inputs = batch.build({"b": 2})
    assert inputs is not None
    assert inputs.input_ids.tolist() == [50, 51]


@pytest.mark.parametrize("scheduled", [4, 100])
def test_tokens_that_do_not_exist_are_refused(scheduled: int) -> None:
    batch = _batch()
    batch.add(new_request("a", [1, 2, 3], [0]))
    with pytest.raises(IntegrityError, match="a is scheduled up to"):
        batch.build({"a": scheduled})


def test_missing_blocks_are_refused() -> None:
    batch = _batch()
    batch.add(new_request("a", range(5), [0]))
    with pytest.raises(IntegrityError, match="1 blocks"):
        batch.build({"a": 5})


def test_a_full_context_still_samples() -> None:
    batch = _batch()
    slot = batch.add(new_request("a", range(32), range(8)))
    inputs = batch.build({"a": 32})
    assert inputs is not None
    batch.append(np.array([slot]), np.array([7]))
    assert len(batch.token_ids(slot)) == 33
    with pytest.raises(IntegrityError, match="33 tokens"):
        batch.add(new_request("b", range(33), range(9)))


def test_broken_requests_are_left_out_until_they_come_again() -> None:
    batch = _batch()
    batch.add(new_request("a", [1, 2], [0]))
    batch.add(new_request("b", [3, 4], [1]))
    batch.set_broken(["a", "unknown"])
    batch.update([CachedRequest("unknown", [], 1)])
    inputs = batch.build({"a": 2, "unknown": 1, "b": 2})
    assert inputs is not None
    assert inputs.keys == ["b"]
    assert batch.build({"a": 2}) is None
    batch.remove("a")
    batch.add(new_request("a", [1, 2], [0]))
    inputs = batch.build({"a": 2, "b": 2})
    assert inputs is not None
    assert inputs.keys == ["a", "b"]


def test_drafts_are_inputs_behind_the_tokens_without_counting() -> None:
    batch = _batch()
    batch.add(new_request("decode", [1, 2, 3], [9], num_computed_tokens=2))
    slot = batch.add(new_request("drafted", range(10, 16), [5, 3, 8], num_computed_tokens=5))
    batch.add(new_request("chunk", range(20, 30), [7, 1, 2]))
    inputs = batch.build({"decode": 1, "drafted": 4, "chunk": 3}, {"drafted": [90, 91, 92], "unscheduled": [1]})
    assert inputs is not None
    assert inputs.input_ids.tolist() == [3, 15, 90, 91, 92, 20, 21, 22]
    assert inputs.positions.tolist() == [2, 5, 6, 7, 8, 0, 1, 2]
    assert inputs.attention.slot_mapping.tolist() == [38, 13, 14, 15, 32, 28, 29, 30]
    assert inputs.attention.seq_lens.tolist() == [3, 9, 3]
    assert inputs.num_drafts.tolist() == [0, 3, 0]
    assert [inputs.keys[row] for row in inputs.sampling] == ["decode", "drafted"]
    assert inputs.logit_rows.tolist() == [0, 1, 2, 3, 4]
    assert inputs.sample_positions.tolist() == [3, 6]
    assert batch.token_ids(slot).tolist() == list(range(10, 16))
    # One draft is accepted. The scheduler need not say where the next step starts.
    batch.finish_step(inputs)
    batch.extend(slot, [90, 77])
    assert batch.token_ids(slot).tolist() == [*range(10, 16), 90, 77]
    inputs = batch.build({"drafted": 2, "chunk": 7}, {"drafted": [5]})
    assert inputs is not None
    assert inputs.input_ids.tolist() == [77, 5, *range(23, 30)]
    assert inputs.positions.tolist() == [7, 8, *range(3, 10)]
    assert inputs.logit_rows.tolist() == [0, 1, 8]
    assert inputs.sample_positions.tolist() == [8, 10]


@pytest.mark.parametrize(("scheduled", "drafts"), [(3, 3), (5, 3), (6, 5), (2, 1)])
def test_drafts_that_do_not_fit_are_refused(scheduled: int, drafts: int) -> None:
    """Fewer or more tokens than there are, no block for the last, and tokens of the prompt left out before the draft."""
    batch = _batch()
    computed = 1 if scheduled == 2 else 3
    batch.add(new_request("a", [1, 2, 3, 4], [0, 1], num_computed_tokens=computed))
    with pytest.raises(IntegrityError, match=f"and {drafts} drafts"):
        batch.build({"a": scheduled}, {"a": [7] * drafts})


def test_drafts_reach_up_to_the_end_of_the_context_and_no_further() -> None:
    batch = _batch()
    batch.add(new_request("a", range(30), range(9), num_computed_tokens=29))
    inputs = batch.build({"a": 3}, {"a": [7, 8]})
    assert inputs is not None
    assert inputs.positions.tolist() == [29, 30, 31]
    with pytest.raises(IntegrityError, match="and 3 drafts"):
        batch.build({"a": 4}, {"a": [7] * 3})
