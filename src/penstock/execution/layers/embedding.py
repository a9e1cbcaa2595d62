"""Token embedding and the output head that may share its table.

The ranks of `options.part.tensor` have equal pieces of the vocabulary, the last one maybe less. Looking up adds up what they have, which
is zero everywhere but on one rank; logits are gathered.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.errors import ConfigError, IntegrityError
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.quantized import QuantizedTensor, StoredWeight
from penstock.execution.layers.linear import LinearKernel, PackedLinear, PlainLinear, linear_kernel, packing_pays
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import Slot, Slots, as_float
from penstock.execution.parallel.sharding import WHOLE, Shard, padded_part

# Up to this many bytes, a tied table may be in memory twice.
_SMALL_TABLE = 16 * 2**20


class Table(Protocol):
    """Rows to look up. nbytes: what it holds in memory and nobody else does."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, input_ids: Tensor) -> Tensor: ...


class RowLinear(LinearKernel, Protocol):
    """A kernel whose weight can be looked up in: ids int64 [T] → rows [T, K] in `dtype`."""

    def dequantize_rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor: ...


class PlainTable:
    """A tensor [vocab_size, hidden_size]."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.nbytes = table.nbytes

    def __call__(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.table)


class PackedTable:
    """A weight in the layout of the native kernels. `shared`: it belongs to the output head, so it takes no memory of its own."""

    def __init__(self, weight: NativeLinear, *, shared: bool) -> None:
        self.weight = weight
        self.nbytes = 0 if shared else weight.nbytes

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.weight.dequantize_rows(input_ids)


class GPUTable:
    """A weight in the layout of the GPU's kernels, rows of which come in `dtype`. `shared`: as for PackedTable."""

    def __init__(self, weight: RowLinear, dtype: torch.dtype, *, shared: bool) -> None:
        self.weight = weight
        self.dtype = dtype
        self.nbytes = 0 if shared else weight.nbytes

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.weight.dequantize_rows(input_ids, self.dtype)


class VocabEmbedding(nn.Module):
    """Token ids int64 [T] → vectors [T, hidden_size], a fresh tensor that the caller may change.

    The table keeps the type that the checkpoint stores it in, unless activations have a smaller one. Quantised tables are looked up as
    they are where kernels can. `lookups`: False where it is only the place for the weight of the output head that is tied to it, as in
    the last stage of a pipeline.
    """

    def __init__(self, vocab_size: int, hidden_size: int, options: LayerOptions, *, lookups: bool = True) -> None:
        super().__init__()
        self.shape = (vocab_size, hidden_size)
        self.options = options
        self.lookups = lookups
        self.rows = _vocabulary_part(vocab_size, options)
        self.head: LMHead | None = None
        self._table: Table | None = None

    @property
    def table(self) -> Table:
        """Raises IntegrityError before the layer is loaded."""
        if self._table is None:
            raise IntegrityError("an embedding was used before its table was loaded")
        return self._table

    @property
    def nbytes(self) -> int:
        """Memory of the table that is not the output head's."""
        return self.table.nbytes if self.lookups else 0

    def slots(self) -> Slots:
        """The place for the table. With a tied head it is treated as the head's weight."""
        shard = _vocabulary_shard(self.rows, self.shape[0])
        return {("weight", None): Slot(self.shape, "table" if self.head is None else "head", self._take, shard)}

    @property
    def native_weight(self) -> NativeLinear | None:
        """The table in the layout of the native kernels, if that is how it is kept."""
        return self._table.weight if isinstance(self._table, PackedTable) else None

    def take_native(self, weight: NativeLinear) -> None:
        """Use a table that was packed before."""
        self._table = PackedTable(weight, shared=self.head is not None)
        if self.head is not None:
            self.head.take_native(weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        tensor = self.options.part.tensor
        if tensor.size == 1:
            return self.table(input_ids).to(self.options.dtype)
        start, stop = self.rows
        absent = (input_ids < start) | (input_ids >= stop)
        rows = self.table((input_ids - start).masked_fill_(absent, 0)).to(self.options.dtype)
        return tensor.all_reduce(rows.masked_fill_(absent.unsqueeze(-1), 0))

    def _take(self, value: StoredWeight) -> None:
        if self.head is not None:
            self._table = self.head.take_tied(value, lookups=self.lookups)
            return
        if self.options.native and isinstance(value, QuantizedTensor):
            weight = linear_kernel([value], None, self.options)
            if isinstance(weight, NativeLinear):
                self._table = PackedTable(weight, shared=False)
                return
        if self.options.triton and not isinstance(value, Tensor):
            from penstock.execution.layers.gpu_linear import lookup_kernel

            if (kernel := lookup_kernel(value, self.options)) is not None:
                self._table = GPUTable(kernel, self.options.dtype, shared=False)
                return
        self._table = PlainTable(_smallest(as_float(value), self.options))


class LMHead(nn.Module):
    """Hidden states [M, hidden_size] → logits float32 [M, vocab_size]. With `tied_to`, the weight is the embedding's table.

    A native head, and a quantised one on a GPU, is looked up in as it is, so there is one table in memory. Torch's packed head is about
    twice as fast as a plain one for small batches, but nothing can be looked up in it. So where the checkpoint is stored in half precision
    and arithmetic is float32, lookups read a table of the stored type and the head has the float32 one for itself. Small tables are simply
    kept twice. Everywhere else the two share one plain table.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, options: LayerOptions, *, tied_to: VocabEmbedding | None = None
    ) -> None:
        super().__init__()
        self.shape = (vocab_size, hidden_size)
        self.options = options
        self.rows = _vocabulary_part(vocab_size, options)
        self.tied = tied_to is not None
        self._kernel: LinearKernel | None = None
        self._shares_table = False
        if tied_to is not None:
            # Not a submodule of the embedding: the head is part of the model under its own name.
            object.__setattr__(tied_to, "head", self)

    @property
    def kernel(self) -> LinearKernel:
        """What computes the product. Raises IntegrityError before the layer is loaded."""
        if self._kernel is None:
            raise IntegrityError("an output head was used before its weight was loaded")
        return self._kernel

    @property
    def nbytes(self) -> int:
        """Memory of the weight; 0 when it is a plain table that the embedding counts."""
        return 0 if self._shares_table else self.kernel.nbytes

    def slots(self) -> Slots:
        """The place for the weight; none when it comes with the embedding."""
        shard = _vocabulary_shard(self.rows, self.shape[0])
        return {} if self.tied else {("weight", None): Slot(self.shape, "head", self._take, shard)}

    @property
    def native_weight(self) -> NativeLinear | None:
        """The weight in the layout of the native kernels; None when the embedding has it as well."""
        return self._kernel if isinstance(self._kernel, NativeLinear) and not self.tied else None

    def take_native(self, weight: NativeLinear) -> None:
        """Use a weight that was packed before."""
        self._kernel = weight

    def take_tied(self, value: StoredWeight, *, lookups: bool = True) -> Table | None:
        """Take the embedding's weight; returns the table for lookups, None if there are none and the weight is no table by itself."""
        if self.options.native:
            self._take(value)
            if isinstance(self._kernel, NativeLinear):
                return PackedTable(self._kernel, shared=True)
        if self.options.triton and not isinstance(value, Tensor):
            from penstock.execution.layers.gpu_linear import lookup_kernel

            if (kernel := lookup_kernel(value, self.options)) is not None:
                self._kernel = kernel
                return GPUTable(kernel, self.options.dtype, shared=True)
        if not lookups:
            self._take(value)
            return None
        stored = _smallest(as_float(value), self.options)
        weight = stored.to(self.options.dtype)
        if packing_pays(weight) and (stored.dtype != weight.dtype or weight.nbytes <= _SMALL_TABLE):
            self._kernel = PackedLinear(weight, None)
            return PlainTable(stored)
        self._shares_table = True
        self._kernel = PlainLinear(weight, None)
        return PlainTable(weight)

    def forward(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """With `out`, float32 [M, vocab_size], the logits are written there."""
        logits = self.kernel(hidden)
        if self.options.part.tensor.size > 1:
            logits = self._gathered(logits)
        return logits.float().contiguous() if out is None else out.copy_(logits)

    def _gathered(self, logits: Tensor) -> Tensor:
        """The logits of all ranks, [M, vocab_size]. Shares that are shorter than the first are at the end, and so is what pads them."""
        tensor = self.options.part.tensor
        share = -(-self.shape[0] // tensor.size)
        padded = F.pad(logits, (0, share - logits.shape[1])) if logits.shape[1] < share else logits
        return tensor.all_gather(padded)[:, : self.shape[0]]

    def _take(self, value: StoredWeight) -> None:
        self._kernel = linear_kernel([value], None, self.options)


def _vocabulary_part(vocab_size: int, options: LayerOptions) -> tuple[int, int]:
    """The token ids [start, stop) of this rank. Raises ConfigError when it has none."""
    tensor = options.part.tensor
    start, stop = padded_part(vocab_size, tensor.rank, tensor.size)
    if start == stop:
        raise ConfigError(
            f"--tensor-parallel-size {tensor.size} is too much for the model's vocabulary of {vocab_size} tokens; choose less."
        )
    return start, stop


def _vocabulary_shard(rows: tuple[int, int], vocab_size: int) -> Shard:
    return WHOLE if rows == (0, vocab_size) else Shard(rows)


def _smallest(value: Tensor, options: LayerOptions) -> Tensor:
    """The table on the device, in the type that it has or in that of weights, whichever is smaller."""
    wanted = options.weight_dtype or options.dtype
    dtype = wanted if wanted.itemsize < value.dtype.itemsize else value.dtype
    return value.to(options.device, dtype)
