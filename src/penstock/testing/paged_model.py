"""Runs a model over a paged KV cache step by step, without a scheduler: the tests' view of what a runner does."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from penstock.execution.attention.backend import AttentionBackend, KVCache
from penstock.execution.attention.context import AttentionMetadata, ForwardContext, forward_context
from penstock.execution.models.registry import LoadedModel


@dataclass
class PagedSequence:
    """What a request has computed so far, and its blocks."""

    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)


def make_metadata(
    block_tables: Sequence[Sequence[int]],
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    block_size: int,
    device: torch.device,
) -> AttentionMetadata:
    """Metadata of a step; requests with one query token must come first to be counted as decodes."""
    num_decodes = 0
    while num_decodes < len(query_lens) and query_lens[num_decodes] == 1:
        num_decodes += 1
    tables = np.full((len(seq_lens), max(len(table) for table in block_tables)), -1, dtype=np.int32)
    slots: list[int] = []
    for row, (table, seq_len, query_len) in enumerate(zip(block_tables, seq_lens, query_lens, strict=True)):
        tables[row, : len(table)] = table
        positions = range(seq_len - query_len, seq_len)
        slots += [table[position // block_size] * block_size + position % block_size for position in positions]
    query_start = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
    lengths = np.asarray(seq_lens, dtype=np.int32)
    return AttentionMetadata(
        query_start=torch.from_numpy(query_start).to(device),
        seq_lens=torch.from_numpy(lengths).to(device),
        block_tables=torch.from_numpy(tables).to(device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        num_decodes=num_decodes,
        query_start_host=query_start,
        seq_lens_host=lengths,
        max_seq_len=max(seq_lens),
    )


@dataclass(frozen=True)
class PagedStep:
    """The next tokens of some sequences, single tokens first, as a model takes them. query_lens: of `names`, in their order."""

    names: list[str]
    query_lens: list[int]
    input_ids: Tensor
    positions: Tensor
    metadata: AttentionMetadata


class PagedSequences:
    """Sequences and their blocks, which are handed out in random order, so that no block table is contiguous."""

    def __init__(self, num_blocks: int, block_size: int, seed: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.free_blocks = list(range(num_blocks))
        random.Random(seed).shuffle(self.free_blocks)  # noqa: S311
        self.sequences: dict[str, PagedSequence] = {}

    def advance(self, tokens: Mapping[str, Sequence[int]]) -> PagedStep:
        """The step that computes these tokens, which count as computed from now on. A name that is new starts a sequence."""
        names = sorted(tokens, key=lambda name: len(tokens[name]) != 1)
        input_ids: list[int] = []
        positions: list[int] = []
        for name in names:
            sequence = self.sequences.setdefault(name, PagedSequence())
            start, end = sequence.num_computed, sequence.num_computed + len(tokens[name])
            while len(sequence.block_ids) * self.block_size < end:
                sequence.block_ids.append(self.free_blocks.pop())
            input_ids += tokens[name]
            positions += range(start, end)
            sequence.num_computed = end
        sequences = [self.sequences[name] for name in names]
        query_lens = [len(tokens[name]) for name in names]
        metadata = make_metadata(
            [sequence.block_ids for sequence in sequences],
            [sequence.num_computed for sequence in sequences],
            query_lens,
            self.block_size,
            self.device,
        )
        return PagedStep(
            names,
            query_lens,
            torch.tensor(input_ids, device=self.device),
            torch.tensor(positions, device=self.device),
            metadata,
        )

    def finish(self, name: str) -> None:
        """Forget a sequence and free its blocks, whose memory keeps what was in it."""
        self.free_blocks += self.sequences.pop(name).block_ids


class PagedModel:
    """A loaded model with a KV cache and sequences.

    Unwritten cache memory holds NaN: whoever reads it shows in the logits.
    """

    def __init__(
        self, loaded: LoadedModel, *, num_blocks: int = 128, block_size: int = 16, seed: int = 0, poison: bool = True
    ) -> None:
        config = loaded.config
        self.loaded = loaded
        loaded.model.prepare(num_blocks * block_size)
        device = next(loaded.model.parameters()).device
        spec = dataclasses.replace(
            loaded.cache_spec,
            block_size=block_size,
            key_dtype=loaded.activation_dtype,
            value_dtype=loaded.activation_dtype,
        )
        self.backend: AttentionBackend = loaded.attention_backend
        self.kv_caches: list[KVCache] = [
            self.backend.allocate_kv_cache(num_blocks, spec, device) for _ in range(config.num_layers)
        ]
        if poison:
            for cache in self.kv_caches:
                cache.key.fill_(torch.nan)
                cache.value.fill_(torch.nan)
        self._paged = PagedSequences(num_blocks, block_size, seed, device)
        self.sequences = self._paged.sequences

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Compute the next tokens of each named sequence in one forward pass; logits [tokens, vocab_size] of each.

        A name that is new starts a sequence. Single tokens are put first, as decodes.
        """
        step = self._paged.advance(tokens)
        with torch.inference_mode(), forward_context(ForwardContext(step.metadata, self.kv_caches)):
            hidden = self.loaded.model(step.input_ids, step.positions)
            logits = self.loaded.model.compute_logits(hidden)
        return dict(zip(step.names, torch.split(logits, step.query_lens), strict=True))

    def finish(self, name: str) -> None:
        """Forget a sequence and free its blocks, whose memory keeps what was in it."""
        self._paged.finish(name)
