"""What one forward pass tells every attention layer: which tokens belong to which request, and where their keys and values live.

The query tokens of a step lie one request after the other in flat tensors, requests that decode one token first:

    token      0   1   2 | 3  4  5  6  7 | 8  9
    request    0   1   2 | 3  3  3  3  3 | 4  4        num_decodes = 3
    query_start  [0, 1, 2, 3, 8, 10]

Request r has seq_lens[r] tokens of context, its query tokens included; they are its last ones. Token t of a request lies in block
block_tables[r, t // block_size] at offset t % block_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.attention.backend import KVCache


@dataclass
class AttentionMetadata:
    """The shape of a step. The runner fills it; the device tensors may be views of preallocated buffers.

    With R requests and T query tokens:
    query_start: int32 [R+1], first query token of each request, then T.
    seq_lens: int32 [R], tokens of context including this step's.
    block_tables: int32 [R, max_blocks]; entries beyond a request's last block are ignored.
    slot_mapping: int64 [T], block_id * block_size + offset where each token's key and value are written.
    num_decodes: the first num_decodes requests have exactly one query token.
    query_start_host, seq_lens_host: the same numbers as numpy int32, so that a backend never waits for the device.
    max_seq_len: the largest of seq_lens.
    plan: what a backend derives from the above once per step and reuses in every layer; filled by the backend.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    num_decodes: int
    query_start_host: npt.NDArray[np.int32]
    seq_lens_host: npt.NDArray[np.int32]
    max_seq_len: int
    plan: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        return len(self.seq_lens_host)

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_host[-1])


@dataclass
class ForwardContext:
    """What layers read beside their inputs. `kv_caches` has one entry per layer, indexed by the attention layer's `layer_index`."""

    attention: AttentionMetadata
    kv_caches: list[KVCache]


_current: ContextVar[ForwardContext | None] = ContextVar("penstock_forward_context", default=None)


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` current for the forward pass in the with-block, in this thread only.

    Raises IntegrityError when one is already current: a forward pass never runs inside another.
    """
    if _current.get() is not None:
        raise IntegrityError("a forward context is already set; forward passes do not nest")
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def get_forward_context() -> ForwardContext:
    """The current context. Raises IntegrityError outside `forward_context`."""
    context = _current.get()
    if context is None:
        raise IntegrityError("no forward context is set; call the model inside `with forward_context(...)`")
    return context
