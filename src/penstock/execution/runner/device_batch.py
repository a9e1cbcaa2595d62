"""The device's half of the persistent batch: rows of token ids and blocks per slot, and the buffers that every step's inputs lie in.

    host    PersistentBatch: what is where    ── what changed ──▶   device   token_ids, block_table         by slot
                                                 one copy                        │ one kernel
                                                                             input_ids, positions, …       by row of the step

Buffers keep their place, so that a recorded step finds its inputs. Behind a step that may be replayed (one of decodes, and one that was
prepared with a `query_len`) all rows are padding: seq_lens 0, input_ids 0, positions 0, slot_mapping -1. So a step that was recorded for
more requests reads and writes nothing there. Only rows that the steps before have filled are written for that, by the kernel that
writes the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.engine.step import BlockMove, RequestKey
from penstock.execution.attention.context import AttentionMetadata
from penstock.execution.kernels.triton.step_inputs import append_tokens, prepare_inputs, write_runs
from penstock.execution.runner.accelerator import Accelerator, Mark
from penstock.execution.runner.batch import StepShape
from penstock.execution.runner.device_tensors import allocate_tensors
from penstock.execution.runner.staging import DATA_SIZE, Section, Staging, aligned

Int32Array = npt.NDArray[np.int32]

# Rows of the staging's fixed part, and numbers of a run: see step_inputs.py.
_NUM_ROWS = 5
_RUN_SIZE = 4


class _Run(NamedTuple):
    """`numbers` go to target[row, column : column + len(numbers)]."""

    row: int
    column: int
    numbers: Int32Array


class DeviceBatch:
    """Buffers for steps of up to `max_requests` requests and `max_tokens` tokens, of `max_slots` requests that are known.

    A step is packed (`begin`, `add_request`, `add_blocks`, `add_drafts`, `put`), sent (`upload`), turned into inputs (`prepare`), and
    what it sampled is kept (`append`). `max_inflight`: steps that may be in flight at once. `max_drafts`: drafts of a request in a step.
    `data_size`: token and block ids that are sent with a step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        max_slots: int,
        max_requests: int,
        max_tokens: int,
        max_model_len: int,
        block_size: int,
        max_inflight: int = 2,
        max_drafts: int = 0,
        data_size: int = DATA_SIZE,
    ) -> None:
        self.max_inflight = max_inflight
        self.max_requests = max_requests
        self.max_tokens = max(max_tokens, max_requests)
        # Tokens that a step may sample.
        self.max_samples = min(self.max_tokens, max_requests * (1 + max_drafts))
        self.tensors = allocate_tensors(
            accelerator.device, max_slots, max_requests, self.max_tokens, self.max_samples, max_model_len, block_size
        )
        self._accelerator = accelerator
        self._section = aligned(max_requests + 1)
        # Runs of tokens and of blocks, and two numbers for each token whose log-probability is wanted.
        other_size = 2 * _RUN_SIZE * max_requests + 2 * self.max_tokens
        self._staging = Staging(
            accelerator,
            fixed_size=_NUM_ROWS * self._section,
            data_size=data_size,
            other_size=other_size,
            depth=max_inflight + 1,
        )
        self._results = deque(accelerator.pinned((self.max_samples,), torch.int64) for _ in range(max_inflight + 1))
        self._rows: Int32Array = np.zeros((_NUM_ROWS, self._section), dtype=np.int32)
        self._new_tokens: list[_Run] = []
        self._new_blocks: list[_Run] = []
        self._query_starts: dict[int, Tensor] = {}
        # Rows from which on everything is padding.
        self._filled_requests = self._filled_tokens = 0

    # ---- the buffers ----

    @property
    def input_ids(self) -> Tensor:
        return self.tensors.input_ids

    @property
    def positions(self) -> Tensor:
        return self.tensors.positions

    @property
    def slot_mapping(self) -> Tensor:
        return self.tensors.slot_mapping

    @property
    def query_start(self) -> Tensor:
        return self.tensors.query_start

    @property
    def seq_lens(self) -> Tensor:
        return self.tensors.seq_lens

    @property
    def block_tables(self) -> Tensor:
        return self.tensors.block_tables

    @property
    def request_slots(self) -> Tensor:
        return self.tensors.request_slots

    @property
    def nbytes(self) -> int:
        """What all this takes on the device."""
        tensors = [value for value in vars(self.tensors).values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in [*tensors, self._staging.device])

    def decode_metadata(self, batch_size: int, max_seq_len: int, query_len: int = 1) -> AttentionMetadata:
        """The metadata of any step of up to `batch_size` requests of `query_len` tokens, with contexts of up to `max_seq_len`: views of the
        buffers, and bounds where the host has numbers."""
        if query_len not in self._query_starts:
            self._query_starts[query_len] = (
                torch.arange(self.max_requests + 1, dtype=torch.int32, device=self._accelerator.device) * query_len
            )
        return AttentionMetadata(
            query_start=self._query_starts[query_len][: batch_size + 1],
            seq_lens=self.seq_lens[:batch_size],
            block_tables=self.block_tables[:batch_size],
            slot_mapping=self.slot_mapping[: batch_size * query_len],
            num_decodes=batch_size if query_len == 1 else 0,
            query_start_host=np.arange(batch_size + 1, dtype=np.int32) * np.int32(query_len),
            seq_lens_host=np.full(batch_size, max_seq_len, dtype=np.int32),
            max_seq_len=max_seq_len,
        )

    def metadata(self, shape: StepShape) -> AttentionMetadata:
        """The metadata of the step that was prepared."""
        num_requests = len(shape.keys)
        return AttentionMetadata(
            query_start=self.query_start[: num_requests + 1],
            seq_lens=self.seq_lens[:num_requests],
            block_tables=self.block_tables[:num_requests],
            slot_mapping=self.slot_mapping[: shape.num_tokens],
            num_decodes=shape.num_decodes,
            query_start_host=shape.query_start.astype(np.int32),
            seq_lens_host=shape.ends.astype(np.int32),
            max_seq_len=shape.max_seq_len,
        )

    # ---- a step, from the host to the device ----

    def begin(self) -> None:
        """Begin to pack a step."""
        self._results.rotate(-1)
        self._rows = self._staging.begin().reshape(_NUM_ROWS, self._section)
        self._new_tokens, self._new_blocks = [], []

    def add_request(self, slot: int, token_ids: Int32Array, block_ids: Int32Array) -> None:
        """A request that is new in `slot`, with all its tokens and blocks. They are read before `upload` returns."""
        self._new_tokens.append(_Run(slot, 0, token_ids))
        self._new_blocks.append(_Run(slot, 0, block_ids))

    def add_blocks(self, slot: int, first: int, block_ids: Int32Array) -> None:
        """Blocks appended to the table of `slot`, from column `first` on."""
        self._new_blocks.append(_Run(slot, first, block_ids))

    def add_drafts(self, shape: StepShape, drafts: Mapping[RequestKey, Sequence[int]]) -> None:
        """The drafts that the step verifies, behind the tokens of their requests, where what is sampled will take their place."""
        for row in np.flatnonzero(shape.num_drafts).tolist():
            numbers = np.array(drafts[shape.keys[row]], dtype=np.int32)
            self._new_tokens.append(_Run(int(shape.slots[row]), int(shape.ends[row]) - len(numbers), numbers))

    def put(self, numbers: npt.ArrayLike) -> Section:
        """Up to one number for each token of the step, twice; `view` finds them on the device."""
        return self._staging.put(numbers)

    def put_moves(self, moves: Sequence[BlockMove]) -> Section | Tensor:
        """Source and target of each, in any number."""
        # The last of several moves to one target is the one that counts; on the device all are done at once.
        sources = {move.target: move.source for move in moves}
        return self._staging.put_data([(source, target) for target, source in sources.items()])

    def view(self, packed: Section | Tensor) -> Tensor:
        """int32; for work of this step."""
        return self._staging.view(packed)

    def upload(self, shape: StepShape | None) -> None:
        """Give the device the work of taking over what was packed."""
        if shape is not None:
            self._pack_rows(shape)
        targets = (self.tensors.token_ids, self.tensors.block_table)
        packed = [self._pack_runs(runs) for runs in (self._new_tokens, self._new_blocks)]
        self._staging.send()
        for target, (section, longest, unpacked) in zip(targets, packed, strict=True):
            if section is not None and longest:
                write_runs(target, self.view(section).view(-1, _RUN_SIZE), self._staging.device, longest)
            for run in unpacked:
                # From memory that is not pinned: the host waits until it has been read.
                end = run.column + len(run.numbers)
                target[run.row, run.column : end].copy_(torch.from_numpy(run.numbers))

    def prepare(self, shape: StepShape, query_len: int = 0) -> None:
        """Give the device the work of filling the buffers for the step that was uploaded.

        query_len: rows of each request, for steps that are replayed: no fewer than any request has tokens, no more than any has context;
        or 0. Decodes have one row each in any case.
        """
        num_requests, num_tokens = len(shape.keys), shape.num_tokens
        filled_requests, filled_tokens = self._filled_requests, self._filled_tokens
        if query_len or num_tokens == num_requests:
            num_tokens = num_requests * max(1, query_len)
            self._filled_requests, self._filled_tokens = num_requests, num_tokens
        else:
            self._filled_requests = max(filled_requests, num_requests)
            self._filled_tokens = max(filled_tokens, num_tokens)
            filled_requests = filled_tokens = 0
        prepare_inputs(
            self._staging.device[: _NUM_ROWS * self._section].view(_NUM_ROWS, self._section),
            self.tensors,
            num_requests=num_requests,
            num_tokens=num_tokens,
            max_count=int(shape.counts.max()),
            max_seq_len=shape.max_seq_len,
            filled_requests=filled_requests,
            filled_tokens=filled_tokens,
            query_len=query_len,
        )

    def append(self, token_ids: Tensor, failed: Tensor) -> Tensor:
        """Write what the step sampled, int64 [M], to the tokens of its requests on the device. Behind a draft that was refused that is no
        token of the request, and what its next step brings will be written over it.

        Returns pinned memory where it is when the step's end is reached, with -1 where `failed`, bool [M]. A step that begins when the
        result of this one must have been taken overwrites it.
        """
        append_tokens(self.tensors, token_ids, failed)
        fetched = self._results[0][: len(token_ids)]
        self._accelerator.fetch(self.tensors.sampled[: len(token_ids)], fetched)
        return fetched

    def finish(self, mark: Mark) -> None:
        """`mark` is behind all work of this step."""
        self._staging.sent(mark)

    def _pack_rows(self, shape: StepShape) -> None:
        num_requests = len(shape.keys)
        if num_requests > self.max_requests or shape.num_tokens > self.max_tokens:
            raise IntegrityError(
                f"a step of {num_requests} requests and {shape.num_tokens} tokens; "
                f"there is room for {self.max_requests} and {self.max_tokens}"
            )
        num_samples = shape.num_drafts[shape.sampling] + 1
        ends = np.cumsum(num_samples)
        if len(ends) and ends[-1] > self.max_samples:
            raise IntegrityError(f"a step samples {ends[-1]} tokens; there is room for {self.max_samples}")
        slots, starts, query_start, first_sample, num_drafts = self._rows
        slots[:num_requests] = shape.slots
        starts[:num_requests] = shape.starts
        query_start[: num_requests + 1] = shape.query_start
        first_sample[:num_requests] = -1
        first_sample[shape.sampling] = ends - num_samples
        num_drafts[:num_requests] = shape.num_drafts

    def _pack_runs(self, runs: list[_Run]) -> tuple[Section | None, int, list[_Run]]:
        """Where the packed runs are, the longest of them, and those that have to go on their own."""
        packed: list[_Run] = []
        unpacked: list[_Run] = []
        room = self._staging.data_room
        for run in runs:
            fits = len(run.numbers) <= room
            (packed if fits else unpacked).append(run)
            room -= len(run.numbers) if fits else 0
        if not packed:
            return None, 0, unpacked
        sizes = [len(run.numbers) for run in packed]
        section = self._staging.put(np.concatenate([run.numbers for run in packed]))
        ends = section.start + np.cumsum(sizes)
        entries = [(run.row, run.column, end - size, size) for run, end, size in zip(packed, ends, sizes, strict=True)]
        return self._staging.put(entries), max(sizes), unpacked
