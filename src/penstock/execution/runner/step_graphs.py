"""All recorded steps: decodes of up to so many requests, and verifications of up to so many drafts.

A step that verifies drafts has few tokens of many requests, like a decode, and costs as much to launch. It replays a graph in which every
request has the same number of rows, at least as many as any has tokens; rows in front of requests with fewer are padding (see
kernels/triton/step_inputs.py). There is one set of graphs for each of a few numbers of rows:

    rows per request        requests of a graph
    1                       1, 2, 4, 8, 16, 24 … up to --cuda-graph-max-batch-size         decodes
    1 + drafts              1, 2, 4, 8, 16, 32, 64, as long as that is no more than        a fixed number of drafts
    2, 4, 8, 1 + drafts     512 rows in all                                                as many drafts as pay

So speculation adds at most 28 graphs. Where more requests verify, a step takes so long that its launches are hidden, and nothing is
recorded for it. All sets share the pool of memory of the graphs, and one place for logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.execution.attention.backend import KVCache
from penstock.execution.runner.accelerator import Accelerator
from penstock.execution.runner.cuda_graphs import DecodeGraphs, GraphModel, graph_batch_sizes
from penstock.execution.runner.device_batch import DeviceBatch

# Requests of graphs for verifications, their rows in all, and the rows of each where the number of drafts changes from step to step.
_VERIFYING_SIZES = (1, 2, 4, 8, 16, 32, 64)
_MAX_VERIFYING_ROWS = 512
_ADAPTIVE_LENGTHS = (2, 4, 8)


def verification_lengths(max_drafts: int, *, adaptive: bool) -> list[int]:
    """Rows per request that get graphs, ascending, where requests have up to `max_drafts` drafts, or, unless `adaptive`, mostly as many."""
    if not max_drafts:
        return []
    shorter = [length for length in _ADAPTIVE_LENGTHS if length <= max_drafts] if adaptive else []
    return [*shorter, 1 + max_drafts]


class StepGraphs:
    """Graphs of steps over the buffers of `inputs`.

    largest: most requests of a decode that gets a graph; lengths: see `verification_lengths`. max_seq_len, vocab_size: see DecodeGraphs.
    Nothing is recorded before `capture`.
    """

    def __init__(
        self,
        model: GraphModel,
        inputs: DeviceBatch,
        accelerator: Accelerator,
        *,
        largest: int,
        max_seq_len: int,
        vocab_size: int,
        lengths: Sequence[int] = (),
    ) -> None:
        sizes = {1: graph_batch_sizes(largest)}
        for length in lengths:
            room = min(inputs.max_tokens, _MAX_VERIFYING_ROWS) // length
            fitting = [size for size in _VERIFYING_SIZES if size <= min(largest, room)]
            if fitting and length <= max_seq_len:
                sizes[length] = fitting
        rows = max(length * some[-1] for length, some in sizes.items())
        logits = torch.zeros(rows, vocab_size, dtype=torch.float32, device=accelerator.device)
        self._graphs = {
            length: DecodeGraphs(
                model,
                inputs,
                accelerator,
                sizes=some,
                max_seq_len=max_seq_len,
                logits=logits,
                query_len=length,
            )
            for length, some in sizes.items()
        }

    @property
    def account(self) -> str:
        """What was captured, and what it took."""
        return "; ".join(graphs.account for graphs in self._graphs.values())

    def query_len(self, num_requests: int, longest: int) -> int:
        """How many rows each request has in the recorded step for so many requests of up to `longest` tokens; 0 when there is none."""
        for length, graphs in self._graphs.items():
            if length >= longest:
                return length if graphs.holds(num_requests) else 0
        return 0

    def run(self, num_requests: int, query_len: int) -> Tensor:
        """Replay the step over the inputs as they are now, with what `query_len` gave: logits float32 [num_requests * query_len, V], a view
        that the next run overwrites."""
        return self._graphs[query_len].run(num_requests)

    def measure(self, kv_caches: list[KVCache]) -> int:
        """What `capture` will take in bytes; see DecodeGraphs."""
        return sum(graphs.measure(kv_caches) for graphs in self._largest_first)

    def capture(self, kv_caches: list[KVCache], *, progress: bool = False) -> None:
        """Record all graphs over the caches that steps will use; see DecodeGraphs."""
        for graphs in self._largest_first:
            graphs.capture(kv_caches, progress=progress)

    @property
    def _largest_first(self) -> list[DecodeGraphs]:
        """In the order in which the later ones find room in what the earlier ones took."""
        return sorted(self._graphs.values(), key=lambda graphs: graphs.num_rows, reverse=True)
