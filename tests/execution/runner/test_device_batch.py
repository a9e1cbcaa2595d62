"""What a step leaves in the device's buffers, and how it gets there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.engine.step import BlockMove, CachedRequest
from penstock.execution.attention.backend import KVCache
from penstock.execution.runner.accelerator import Mark
from penstock.execution.runner.batch import PersistentBatch, StepShape
from penstock.execution.runner.block_mover import BlockMover
from penstock.execution.runner.device_batch import DeviceBatch
from penstock.execution.runner.staging import Staging
from tests.execution.runner.device_harness import PoisoningAccelerator
from tests.execution.runner.harness import CPU, new_request

BLOCK_SIZE, MAX_MODEL_LEN = 4, 32


class Halves:
    """Both halves of a batch; `step` does what a runner does without a model."""

    def __init__(
        self, *, max_requests: int = 4, max_tokens: int = 16, max_drafts: int = 0, data_size: int = 64
    ) -> None:
        self.accelerator = PoisoningAccelerator()
        self.host = PersistentBatch(6, MAX_MODEL_LEN, BLOCK_SIZE, CPU)
        self.device = DeviceBatch(
            self.accelerator,
            max_slots=6,
            max_requests=max_requests,
            max_tokens=max_tokens,
            max_model_len=MAX_MODEL_LEN,
            block_size=BLOCK_SIZE,
            max_drafts=max_drafts,
            data_size=data_size,
        )

    def add(self, key: str, token_ids: range, block_ids: list[int], num_computed_tokens: int = 0) -> None:
        slot = self.host.add(new_request(key, token_ids, block_ids, num_computed_tokens=num_computed_tokens))
        self.device.add_request(slot, self.host.token_ids(slot), self.host.block_ids(slot))

    def step(
        self, scheduled: dict[str, int], drafts: dict[str, list[int]] | None = None, query_len: int = 0
    ) -> StepShape:
        shape = self.host.shape(scheduled, drafts or {})
        assert shape is not None
        self.device.add_drafts(shape, drafts or {})
        self.device.upload(shape)
        self.device.prepare(shape, query_len)
        self.host.finish_step(shape)
        self.device.finish(self.accelerator.mark())
        return shape

    def assert_inputs(self, scheduled: dict[str, int], drafts: dict[str, list[int]] | None = None) -> None:
        """The step's inputs are those that the host alone would have built."""
        expected = self.host.build(scheduled, drafts or {})
        shape = self.step(scheduled, drafts)
        assert expected is not None
        found = self.device.metadata(shape)
        device, attention = self.device, expected.attention
        num_tokens = shape.num_tokens
        assert torch.equal(device.input_ids[:num_tokens], expected.input_ids)
        assert torch.equal(device.positions[:num_tokens], expected.positions)
        assert device.request_slots[: len(shape.keys)].tolist() == shape.slots.tolist()
        num_samples = len(expected.logit_rows)
        assert torch.equal(device.tensors.logit_rows[:num_samples], expected.logit_rows)
        owners = np.repeat(shape.sampling, shape.num_drafts[shape.sampling] + 1)
        assert device.tensors.sample_slots[:num_samples].tolist() == shape.slots[owners].tolist()
        positions = expected.positions[expected.logit_rows] + 1
        assert torch.equal(device.tensors.sample_positions[:num_samples], positions)
        for name in ("query_start", "seq_lens", "slot_mapping"):
            assert torch.equal(getattr(found, name), getattr(attention, name)), name
        for name in ("query_start_host", "seq_lens_host"):
            assert np.array_equal(getattr(found, name), getattr(attention, name)), name
        assert (found.num_decodes, found.max_seq_len) == (attention.num_decodes, attention.max_seq_len)
        for row, end in enumerate(shape.ends.tolist()):
            width = -(-end // BLOCK_SIZE)
            assert torch.equal(found.block_tables[row, :width], attention.block_tables[row, :width])

    def assert_padding_from(self, row: int) -> None:
        for tensor, padding in (
            (self.device.seq_lens, 0),
            (self.device.input_ids, 0),
            (self.device.positions, 0),
            (self.device.slot_mapping, -1),
        ):
            assert tensor[row : self.device.max_requests].tolist() == [padding] * (self.device.max_requests - row)


def test_inputs_are_those_of_the_host() -> None:
    halves = Halves()
    halves.device.begin()
    halves.add("decode", range(10, 16), [5, 3], 5)
    halves.add("first chunk", range(20, 30), [7, 1], 0)
    halves.add("last chunk", range(40, 49), [2, 0, 6], 6)
    halves.assert_inputs({"decode": 1, "last chunk": 3, "first chunk": 5})
    halves.device.begin()
    slot = halves.host.request("first chunk").slot
    (new,) = halves.host.update([CachedRequest("first chunk", [9], 5)])
    halves.device.add_blocks(slot, new.first, halves.host.block_ids(slot)[new.first : new.end])
    halves.assert_inputs({"first chunk": 5})


def test_rows_behind_decodes_are_padding() -> None:
    halves = Halves()
    halves.assert_padding_from(0)
    halves.device.begin()
    for number, key in enumerate("abcd"):
        halves.add(key, range(8), [2 * number, 2 * number + 1])
    halves.step({"a": 5, "b": 4, "c": 3, "d": 2})  # more tokens than a step of decodes can have
    for keys in ("abcd", "ab", "b", "abc"):
        halves.device.begin()
        halves.step(dict.fromkeys(keys, 1))
        halves.assert_padding_from(len(keys))
        assert (halves.device.seq_lens[: len(keys)] > 0).all()


def test_drafts_are_inputs_behind_the_tokens_of_their_requests() -> None:
    halves = Halves(max_drafts=3)
    halves.device.begin()
    halves.add("decode", range(10, 16), [5, 3], 5)
    halves.add("drafts", range(20, 26), [7, 1, 4], 5)
    halves.add("chunk", range(40, 49), [2, 0, 6], 0)
    halves.assert_inputs({"decode": 1, "drafts": 4, "chunk": 5}, {"drafts": [91, 92, 93]})
    assert halves.device.input_ids[1:5].tolist() == [25, 91, 92, 93]
    # The next step starts from what was sampled, wherever drafts were.
    tokens = torch.tensor([70, 91, 60, 61, 62])
    halves.device.append(tokens, torch.zeros(5, dtype=torch.bool))
    halves.accelerator.mark().wait()
    halves.host.append(np.array([halves.host.request("decode").slot]), np.array([70]))
    halves.host.extend(halves.host.request("drafts").slot, [91, 60])
    halves.device.begin()
    halves.host.update([CachedRequest("decode", [], 6), CachedRequest("drafts", [], 7)])
    halves.assert_inputs({"decode": 1, "drafts": 3, "chunk": 4}, {"drafts": [94, 95]})
    assert halves.device.input_ids[:4].tolist() == [70, 60, 94, 95]


def test_recorded_drafts_have_padding_in_front_and_behind() -> None:
    halves = Halves(max_drafts=3)
    halves.device.begin()
    for number, key in enumerate("abcd"):
        halves.add(key, range(8), [2 * number, 2 * number + 1, 20 + number])
    halves.step({"a": 8, "b": 7})
    halves.device.append(torch.tensor([8]), torch.tensor([False]))
    halves.host.append(np.array([halves.host.request("a").slot]), np.array([8]))
    device = halves.device
    for drafts, query_len in (([50, 51], 3), ([], 3), ([50, 51], 4), ([], 1)):
        halves.device.begin()
        halves.host.update([CachedRequest("a", [], 8), CachedRequest("b", [], 7)])
        halves.step({"b": 1, "a": 1 + len(drafts)}, {"a": drafts} if drafts else None, query_len)
        written = [[7], [8 + place for place in range(1 + len(drafts))]]
        for request, positions in enumerate(written):
            rows = slice(request * query_len, (request + 1) * query_len)
            front = [0] * (query_len - len(positions))
            assert device.positions[rows].tolist() == front + positions
            assert (device.slot_mapping[rows] >= 0).tolist() == [place >= len(front) for place in range(query_len)]
            assert device.input_ids[rows].tolist() == front + ([7] if request == 0 else [8, *drafts])
        assert device.tensors.logit_rows[:2].tolist() == [query_len - 1, 2 * query_len - 1 - len(drafts)]
        behind = slice(2 * query_len, device.max_tokens)
        for tensor, padding in ((device.input_ids, 0), (device.positions, 0), (device.slot_mapping, -1)):
            assert (tensor[behind] == padding).all()
        assert device.seq_lens.tolist() == [8, 9 + len(drafts), 0, 0]


def test_metadata_of_decodes_has_bounds_and_keeps_its_place() -> None:
    device = Halves().device
    for size, length in ((1, 1), (3, 2)):
        metadata = device.decode_metadata(size, 20, length)
        again = device.decode_metadata(size, 20, length)
        assert (
            metadata.query_start.tolist() == metadata.query_start_host.tolist() == [length * i for i in range(size + 1)]
        )
        assert metadata.seq_lens_host.tolist() == [20] * size
        assert metadata.num_decodes == (size if length == 1 else 0)
        assert metadata.slot_mapping.shape == (size * length,)
        for name in ("query_start", "seq_lens", "block_tables", "slot_mapping"):
            assert getattr(metadata, name).data_ptr() == getattr(again, name).data_ptr(), name


def test_sampled_tokens_are_where_the_next_step_looks() -> None:
    halves = Halves()
    halves.device.begin()
    halves.add("a", range(3), [0])
    halves.add("b", range(4), [1])
    shape = halves.step({"a": 3, "b": 4})
    fetched = halves.device.append(torch.tensor([77, 0]), torch.tensor([False, True]))
    assert fetched.tolist() != [77, -1]
    halves.accelerator.mark().wait()
    assert fetched.tolist() == [77, -1]
    slot = shape.slots[0]
    assert halves.device.tensors.token_ids[slot, :4].tolist() == [0, 1, 2, 77]


@pytest.mark.parametrize("data_size", [0, 5, 8, 1000])
def test_what_the_staging_has_no_room_for_arrives_all_the_same(data_size: int) -> None:
    halves = Halves(data_size=data_size)
    halves.device.begin()
    halves.add("a", range(10, 16), [5, 3])
    halves.add("b", range(30, 38), [1, 2])
    moves = halves.device.put_moves([BlockMove(3, 4), BlockMove(5, 6), BlockMove(9, 4)])
    halves.assert_inputs({"a": 6, "b": 8})
    # Of two moves to one target the later counts.
    assert halves.device.view(moves).view(-1, 2).tolist() == [[9, 4], [5, 6]]


def test_a_step_that_is_too_large_is_refused() -> None:
    halves = Halves(max_requests=2, max_tokens=8)
    halves.device.begin()
    for key in "abc":
        halves.add(key, range(8), [0, 1])
    with pytest.raises(IntegrityError, match="3 requests and 3 tokens"):
        halves.step(dict.fromkeys("abc", 1))
    with pytest.raises(IntegrityError, match="2 requests and 9 tokens"):
        halves.step({"a": 8, "b": 1})
    assert halves.device.nbytes > 0
    halves = Halves(max_requests=2, max_drafts=1)
    halves.device.begin()
    halves.add("a", range(2), [0, 1])
    halves.add("b", range(1), [2, 3])
    halves.step({"a": 2, "b": 1})
    halves.host.append(np.array([halves.host.request("a").slot]), np.array([8]))
    with pytest.raises(IntegrityError, match="samples 5 tokens; there is room for 4"):
        halves.step({"a": 5}, {"a": [1, 2, 3, 4]})


def test_memory_that_is_being_copied_is_not_written_to() -> None:
    """The third step waits for the first, whose memory it takes; before that nobody waits."""
    accelerator = PoisoningAccelerator()
    staging = Staging(accelerator, fixed_size=4, data_size=8, other_size=8, depth=2)
    marks: list[Mark] = []
    for number in range(3):
        if number == 2:
            assert not any(mark.reached() for mark in marks)
        staging.begin()[:] = number
        section = staging.put([10 + number, 20 + number])
        staging.send()
        assert staging.device[:4].tolist() == [number] * 4
        assert staging.view(section).tolist() == [10 + number, 20 + number]
        marks.append(accelerator.mark())
        staging.sent(marks[-1])
    assert [mark.reached() for mark in marks] == [True, False, False]
    for mark in marks:
        mark.wait()
    with pytest.raises(IntegrityError, match="room for"):
        staging.put(range(1000))


def _caches(num_blocks: int, block_numbers: int = 8) -> list[KVCache]:
    def numbers() -> Tensor:
        return torch.randn(num_blocks, 2, block_numbers // 2)

    return [KVCache(numbers(), numbers(), numbers()) for _ in range(2)]


def test_blocks_move_in_all_layers() -> None:
    device, host = _caches(5), _caches(3)
    before = [[tensor.clone() for tensor in cache.tensors] for cache in device]
    mover = BlockMover(device, host, CPU)
    mover.swap_out(torch.tensor([[4, 0], [1, 2]], dtype=torch.int32))
    mover.copy(torch.tensor([[0, 4]], dtype=torch.int32))
    mover.swap_in(torch.tensor([[0, 3], [2, 2]], dtype=torch.int32))
    for cache, tensors in zip(device, before, strict=True):
        for found, old in zip(cache.tensors, tensors, strict=True):
            assert torch.equal(found, old[[0, 1, 1, 4, 0]])


def test_caches_that_cannot_be_moved_are_refused() -> None:
    with pytest.raises(IntegrityError, match="16 bytes"):
        BlockMover(_caches(5, 6), [], CPU)
    with pytest.raises(IntegrityError, match="another size"):
        BlockMover(_caches(5), _caches(3, 16), CPU)
    with pytest.raises(IntegrityError, match="does not exist"):
        BlockMover(_caches(5), [], CPU).swap_in(torch.tensor([[0, 3]], dtype=torch.int32))
