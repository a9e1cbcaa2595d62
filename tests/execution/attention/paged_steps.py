"""Steps over a paged cache whose unused memory is poisoned, and attention written out to judge them by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.execution.attention.backend import KVCache
from penstock.execution.attention.context import AttentionMetadata
from penstock.testing.paged_model import make_metadata

CPU = torch.device("cpu")
HEAD_DIM = 64


@dataclass
class PagedStep:
    """Random queries over random contexts. keys and values: per request [seq_len, KVH, D]; the cache's other slots hold NaN."""

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    cache: KVCache
    metadata: AttentionMetadata

    def to(self, device: torch.device) -> PagedStep:
        """The same step there; keys and values written out stay."""
        names = ("query_start", "seq_lens", "block_tables", "slot_mapping")
        tensors = {name: getattr(self.metadata, name).to(device) for name in names}
        metadata = replace(self.metadata, plan={}, **tensors)
        cache = KVCache(self.cache.key.to(device), self.cache.value.to(device))
        return PagedStep(self.query.to(device), self.keys, self.values, cache, metadata)


def make_paged_step(
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    block_size: int = 16,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> PagedStep:
    """The blocks of a request lie anywhere, and block tables are the left part of a wider buffer, as the runner's are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [-(-length // block_size) for length in seq_lens]
    free = list(range(sum(sizes) + 3))
    random.Random(seed).shuffle(free)
    tables = [[free.pop() for _ in range(size)] for size in sizes]
    shape = (sum(sizes) + 3, block_size, num_kv_heads, HEAD_DIM)
    cache = KVCache(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
    keys, values = [
        [torch.randn(length, num_kv_heads, HEAD_DIM, generator=generator).to(dtype) for length in seq_lens]
        for _ in range(2)
    ]
    for table, key, value in zip(tables, keys, values, strict=True):
        positions = torch.arange(len(key))
        where = torch.tensor(table)[positions // block_size], positions % block_size
        cache.key[where], cache.value[where] = key, value
    query = torch.randn(sum(query_lens), num_heads, HEAD_DIM, generator=generator).to(dtype)
    metadata = make_metadata(tables, seq_lens, query_lens, block_size, CPU)
    wider = torch.full((len(seq_lens), metadata.block_tables.shape[1] + 2), 10**6, dtype=torch.int32)
    wider[:, :-2] = metadata.block_tables
    metadata.block_tables = wider[:, :-2]
    return PagedStep(query, keys, values, cache, metadata)


def written_out(step: PagedStep, scale: float, sliding_window: int | None) -> Tensor:
    """Attention token by token and head by head, in float64; zero for a request without tokens."""
    output = torch.zeros(step.query.shape, dtype=torch.float64)
    starts = step.metadata.query_start_host
    for request, (key, value) in enumerate(zip(step.keys, step.values, strict=True)):
        group = step.query.shape[1] // key.shape[1]
        for token in range(starts[request], starts[request + 1]):
            position = len(key) - int(starts[request + 1]) + token
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(step.query.shape[1] if len(key) else 0):
                visible = slice(first, position + 1), head // group
                weights = (key[visible].double() @ step.query[token, head].double() * scale).softmax(0)
                output[token, head] = weights @ value[visible].double()
    return output
