"""Token embedding and the output head that may share its table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.execution.layers.linear import LinearKernel, PlainLinear, linear_kernel, packing_pays
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import Weight

# Rows compared at once when a smaller copy of a table is checked, so that the check needs no second table.
_ROWS_PER_CHECK = 4096

# Up to this many bytes, a tied table may be in memory twice.
_SMALL_TABLE = 16 * 2**20


class VocabEmbedding(nn.Module):
    """Token ids int64 [T] → vectors [T, hidden_size], a fresh tensor that the caller may change."""

    def __init__(self, vocab_size: int, hidden_size: int, options: LayerOptions) -> None:
        super().__init__()
        self.weight: Weight | None = Weight((vocab_size, hidden_size), options)
        self.dtype = options.dtype
        self._table = self.weight.data

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return self._table.nbytes

    def shrink(self, dtype: torch.dtype) -> bool:
        """Look up in a copy of type `dtype` from now on. False, and nothing is done, unless that is smaller and exact."""
        if dtype.itemsize >= self._table.dtype.itemsize:
            return False
        smaller = self._table.to(dtype)
        for start in range(0, len(smaller), _ROWS_PER_CHECK):
            rows = slice(start, start + _ROWS_PER_CHECK)
            if not torch.equal(smaller[rows].to(self._table.dtype), self._table[rows]):
                return False
        self._table = smaller
        return True

    def finish_loading(self) -> None:
        """The table is no parameter of this module any more. Idempotent."""
        self.weight = None

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self._table).to(self.dtype)


class LMHead(nn.Module):
    """Hidden states [M, hidden_size] → logits float32 [M, vocab_size]. With `tied_to`, the weight is the embedding's table.

    A packed head is about twice as fast for small batches, but nothing can be looked up in a packed table. So where the
    checkpoint is stored in half precision and arithmetic is float32, lookups read a table of the stored type and the head has the
    float32 one for itself. Small tables are simply kept twice. Everywhere else the two share one plain table.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, options: LayerOptions, *, tied_to: VocabEmbedding | None = None
    ) -> None:
        super().__init__()
        self.tied = tied_to is not None
        weight = None if tied_to is None else tied_to.weight
        if weight is None:
            weight = Weight((vocab_size, hidden_size), options)
        self.weight: Weight | None = weight
        self._kernel: LinearKernel = PlainLinear(weight, None)

    @property
    def nbytes(self) -> int:
        """Memory of the weight; 0 when it is the embedding's table."""
        return 0 if self.tied else self._kernel.nbytes

    def finish_loading(self, embedding: VocabEmbedding, stored_as: torch.dtype) -> None:
        """Hand the weight to this device's kernel; it is no parameter of this module any more. Idempotent.

        stored_as: the type that the checkpoint's numbers had.
        """
        if self.weight is None:
            return
        if self.tied and packing_pays(self.weight):
            self.tied = not (embedding.shrink(stored_as) or self.weight.nbytes <= _SMALL_TABLE)
        if not self.tied:
            self._kernel = linear_kernel(self.weight.data, None)
        self.weight = None

    def forward(self, hidden: Tensor) -> Tensor:
        return self._kernel(hidden).float()
