"""CUDA graphs of steps in which all requests have equally many tokens: the kernels of a whole step recorded once, then launched as one.

A step of a small model is hundreds of kernels of a few microseconds, and launching each from the host takes as long as running it. A
graph is launched at the cost of one. What it replays is fixed: the kernels, their grids and every address. So a step's inputs lie in
buffers that keep their place (see DeviceBatch), and there is one graph for each of a set of batch sizes; a step uses the
smallest that holds it, with rows that are padding behind its requests: no context, token 0, a slot that is not written.

    requests   5          graph of 8      rows  [ 0 1 2 3 4 | padding ]

All graphs share one pool of memory for what they compute on the way. The largest is recorded first, so that the others find room in what
it took, and logits go to one buffer outside of the pool.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from penstock.execution.attention.backend import KVCache
from penstock.execution.attention.context import AttentionMetadata, ForwardContext, forward_context
from penstock.execution.runner.accelerator import Accelerator
from penstock.execution.runner.out_of_memory import memory_must_suffice, mib

logger = logging.getLogger(__name__)

# Up to a size, the distance to the next one: (16, 8) means that graphs up to 16 are 8 apart. Below 16 a decode costs the same whatever its
# size, because weights are all it reads. From 17 requests on, at most 7 rows in 24 are padding, above 64 at most 15 in 80, above 128 at
# most 31 in 160; padding has no context, so it costs a row of the linear layers and nothing of the KV cache.
_STEPS = ((2, 1), (4, 2), (8, 4), (64, 8), (128, 16), (512, 32))
# Largest batch with a graph unless the setting says otherwise: beyond it a step takes so long that its launches are hidden.
DEFAULT_MAX_BATCH_SIZE = 512
# Graphs recorded to find out what they cost: the largest takes the memory of the step, each further one only the driver's for its kernels.
_PROBES = 4


class GraphModel(Protocol):
    """What graphs need of a model: see runner.model_runner.Model. Logits are written to `out`."""

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor: ...

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor: ...


class GraphInputs(Protocol):
    """The device buffers that steps are prepared in, which keep their place: see DeviceBatch."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    def decode_metadata(self, batch_size: int, max_seq_len: int, query_len: int = 1) -> AttentionMetadata: ...


def graph_batch_sizes(largest: int) -> list[int]:
    """Batch sizes that get a graph, ascending, for batches of up to `largest` requests; `largest` is always one of them."""
    sizes, size = [], 0
    for end, distance in _STEPS:
        while size < min(end, largest):
            size += distance
            sizes.append(min(size, largest))
    while size < largest:
        size += _STEPS[-1][1]
        sizes.append(min(size, largest))
    return sizes


class DecodeGraphs:
    """Graphs of steps in which every request has `query_len` tokens: 1 when it decodes, more when guesses are verified.

    sizes: batch sizes, ascending. max_seq_len: the longest context that a request can ever have; what backends decide by length they
    decide for this one. logits: float32, at least [largest size * query_len, V], where replays leave theirs. Nothing is recorded before
    `capture`.
    """

    def __init__(
        self,
        model: GraphModel,
        inputs: GraphInputs,
        accelerator: Accelerator,
        *,
        sizes: list[int],
        max_seq_len: int,
        logits: Tensor,
        query_len: int = 1,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._accelerator = accelerator
        self._sizes = sizes
        self._max_seq_len = max_seq_len
        self._query_len = query_len
        self._logits = logits
        self._replays: list[Callable[[], None]] = []
        # Graphs over the cache that `measure` used. They are never replayed, but hold the pool's memory until others use it.
        self._probes: list[Callable[[], None]] = []
        self.account = "nothing is captured"

    @property
    def largest(self) -> int:
        """The most requests that a graph has room for."""
        return self._sizes[-1]

    @property
    def num_rows(self) -> int:
        """Rows of the largest graph."""
        return self.largest * self._query_len

    def holds(self, num_requests: int) -> bool:
        """Whether there is a graph for so many requests."""
        return bool(self._replays) and num_requests <= self.largest

    def run(self, num_requests: int) -> Tensor:
        """Replay the smallest graph that `holds` so many requests over the inputs as they are now.

        Returns logits float32 [num_requests * query_len, V], a view that the next run overwrites.
        """
        self._replays[bisect_left(self._sizes, num_requests)]()
        return self._logits[: num_requests * self._query_len]

    def measure(self, kv_caches: list[KVCache]) -> int:
        """What `capture` will take in bytes, estimated from a few graphs over caches of any size. Raises ConfigError as `capture` does."""
        free = [self._accelerator.free_bytes()]
        with _garbage_left_alone():
            for size in self._sizes[: -_PROBES - 1 : -1]:
                self._probes.append(self._record(size, kv_caches))
                free.append(self._accelerator.free_bytes())
        first = free[0] - free[1]
        each = -(-(free[1] - free[-1]) // max(1, len(free) - 2))
        return max(0, first) + max(0, each) * (len(self._sizes) - 1)

    def capture(self, kv_caches: list[KVCache], *, progress: bool = False) -> None:
        """Record all graphs over the caches that steps will use. `progress` shows a bar on stderr.

        Raises ConfigError when memory runs out, with what to lower.
        """
        begun, free = time.perf_counter(), self._accelerator.free_bytes()
        replays = []
        bar = tqdm(self._sizes[::-1], "CUDA graphs", unit="graph", disable=not progress, dynamic_ncols=True)
        with bar, _garbage_left_alone():
            for size in bar:
                bar.set_postfix_str(f"batch {size}", refresh=False)
                replays.append(self._record(size, kv_caches))
        self._replays = replays[::-1]
        self._probes.clear()
        taken, seconds = max(0, free - self._accelerator.free_bytes()), time.perf_counter() - begun
        count = f"{len(replays)} graph{'s' if len(replays) > 1 else ''}"
        drafts = f" with {self._query_len - 1} drafts each" if self._query_len > 1 else ""
        self.account = f"captured {count} for batches up to {self.largest}{drafts} in {seconds:.1f} s, {mib(taken)}"
        logger.info("CUDA graphs: %s", self.account)

    def _record(self, size: int, kv_caches: list[KVCache]) -> Callable[[], None]:
        num_tokens = size * self._query_len
        metadata = self._inputs.decode_metadata(size, self._max_seq_len, self._query_len)
        input_ids, positions = self._inputs.input_ids[:num_tokens], self._inputs.positions[:num_tokens]
        logits = self._logits[:num_tokens]

        def step() -> None:
            # What a backend derives from the metadata has to be part of the graph, so each recording derives it anew.
            context = ForwardContext(replace(metadata, plan={}), kv_caches)
            with torch.inference_mode(), forward_context(context):
                self._model.compute_logits(self._model(input_ids, positions), logits)

        with memory_must_suffice(lambda: self._no_memory(size)):
            # Kernels are compiled, loaded and chosen for the shapes of this size before they are recorded: none of that can be.
            step()
            return self._accelerator.record(step)

    def _no_memory(self, size: int) -> str:
        return (
            f"The GPU's memory ran out while the CUDA graph for {size} requests was captured, with {mib(self._accelerator.free_bytes())} "
            "free: lower --cuda-graph-max-batch-size, --memory-utilization or --max-num-seqs, or do without graphs (--enforce-eager)."
        )


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """No garbage collection in the with-block: what it frees may call the driver, which a recording does not bear, and it takes longer than
    recording does."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
