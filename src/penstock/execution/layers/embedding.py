"""Token embedding and the output head that may share its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.execution.layers.linear import LinearKernel, PlainLinear, linear_kernel, packing_pays
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import Weight


class VocabEmbedding(nn.Module):
    """Token ids int64 [T] → vectors [T, hidden_size], a fresh tensor that the caller may change."""

    def __init__(self, vocab_size: int, hidden_size: int, options: LayerOptions) -> None:
        super().__init__()
        self.weight = Weight((vocab_size, hidden_size), options)
        self.dtype = options.dtype
        self._table = self.weight.data

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return self._table.nbytes

    def shrink(self, dtype: torch.dtype) -> bool:
        """Look up in a copy of type `dtype` from now on, if that is smaller and holds exactly the same numbers."""
        if dtype.itemsize >= self._table.dtype.itemsize:
            return False
        smaller = self._table.to(dtype)
        # Row by row in bounded pieces: a whole comparison would take the table's memory once more.
        pieces = zip(smaller.split(4096), self._table.split(4096), strict=True)  # type: ignore[no-untyped-call]
        if not all(torch.equal(small.to(full.dtype), full) for small, full in pieces):
            return False
        self._table = smaller
        return True

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self._table).to(self.dtype)


class LMHead(nn.Module):
    """Hidden states [M, hidden_size] → logits float32 [M, vocab_size]. With `tied_to`, the weight is the embedding's own."""

    def __init__(
        self, vocab_size: int, hidden_size: int, options: LayerOptions, *, tied_to: VocabEmbedding | None = None
    ) -> None:
        super().__init__()
        self.weight: Weight | None = Weight((vocab_size, hidden_size), options) if tied_to is None else tied_to.weight
        self._kernel: LinearKernel = PlainLinear(self.weight, None)

    @property
    def nbytes(self) -> int:
        """Memory of the weight."""
        return self._kernel.nbytes

    def finish_loading(self) -> None:
        """Hand the weight to this device's kernel; it is no parameter of this module any more. Idempotent."""
        if self.weight is not None:
            self._kernel = linear_kernel(self.weight.data, None)
        self.weight = None

    def forward(self, hidden: Tensor) -> Tensor:
        return self._kernel(hidden).float()


def finish_embedding(embedding: VocabEmbedding, head: LMHead, *, tied: bool, stored_as: torch.dtype) -> None:
    """Finish loading both, with one table in memory if they are tied.

    A packed output head is about twice as fast for small batches, but a packed weight cannot be looked up in. Where the
    checkpoint stores half precision, lookups read a table of that type and the head gets the float32 one; otherwise they share it plain.
    """
    weight = embedding.weight.data
    if not tied or (packing_pays(weight) and embedding.shrink(stored_as)):
        head.finish_loading()
