"""Linear layers, named by how their weight relates to the model's other dimension of size, the number of devices.

    ReplicatedLinear            every device holds the whole weight
    ColumnParallelLinear        output features can be split over devices
      MergedColumnParallelLinear  several such layers with one input, computed as one product (gate and up)
      QKVParallelLinear           query, key and value projections, split by heads
    RowParallelLinear           input features can be split; takes what a ColumnParallelLinear gives

Each device, a rank of `options.part.tensor`, has its share of every weight. Slots give the whole tensor's shape and the rank's shard of it;
`in_features` and `out_features` of a layer are those of the rank's share.

Weights are [out_features, in_features] as in checkpoints, plain or quantised. How the product is computed is the business of a
`LinearKernel`, which is made when the last tensor of a layer has come, and keeps the weight in the layout that it likes best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.quantized import StoredWeight
from penstock.execution.layers.native_linear import joined, native_linear_kernel
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import Slot, Slots, as_float
from penstock.execution.parallel.sharding import Shard, even_part, kv_head_part


class LinearKernel(Protocol):
    """y = x @ weight.T + bias for x [T, in_features], with the weight inside. nbytes: what it holds in memory."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class PlainLinear:
    """torch's own product; works everywhere."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """oneDNN's product over a weight packed once into its blocked layout.

    F.linear packs the weight again in every call, which costs more than the product itself for batches between 2 and about 64
    tokens. The packed weight replaces the plain one and takes the same memory. Small weights are packed too, although that makes a
    single token some tens of microseconds slower: a token's result is then the same to the last bit in every batch (measured with
    AVX-512 from 1 to 600 tokens; a token alone is the exception when in_features is above 1024).
    """

    # The layout is made for this many tokens; others from 1 to 512 were measured to be equally good for every batch.
    BATCH_HINT = 16

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, self.BATCH_HINT)
        self.bias = bias
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = self._product(x, self.weight, self.bias, "none", [], "")
        return output


def linear_kernel(parts: Sequence[StoredWeight], bias: Tensor | None, options: LayerOptions) -> LinearKernel:
    """The fastest kernel for weights [N_i, K] whose outputs lie side by side, and their bias [sum N_i].

    Native kernels keep floats and integers in the precision that they have; consecutive parts of one kind become one weight. Torch's
    operators get all parts in the type of activations.
    """
    if options.native:
        return native_linear_kernel(parts, bias, options)
    if options.triton:
        from penstock.execution.layers.gpu_linear import gpu_linear_kernel

        return gpu_linear_kernel(parts, bias, options)
    weight = joined([as_float(part).to(options.device, options.dtype) for part in parts])
    bias = None if bias is None else bias.to(options.device, options.dtype)
    return PackedLinear(weight, bias) if packing_pays(weight) else PlainLinear(weight, bias)


def packing_pays(weight: Tensor) -> bool:
    """Whether `linear_kernel` gives this weight a layout of its own."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and packing_available()


def packing_available() -> bool:
    """Whether this build of torch has oneDNN's packed linear operators."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@dataclass(frozen=True)
class Outputs:
    """Output features of one tensor of the checkpoint: how many it has, and which of them, [start, stop), this rank computes."""

    total: int
    start: int
    stop: int

    @property
    def rows(self) -> tuple[int, int] | None:
        """For a Shard: None when they are all."""
        return None if (self.start, self.stop) == (0, self.total) else (self.start, self.stop)


class Linear(nn.Module):
    """y = x @ weight.T + bias, for x [T, in_features].

    in_features: the whole weight's; columns: those of this rank, None for all of them. outputs: the output features of each tensor of the
    checkpoint, in the order in which they lie side by side; under None where one tensor makes up the layer. What has come is kept as it is
    until the last one comes; then the kernel is made of all of them.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Mapping[str | None, Outputs],
        *,
        bias: bool,
        options: LayerOptions,
        columns: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features if columns is None else columns[1] - columns[0]
        self.out_features = sum(output.stop - output.start for output in outputs.values())
        self.options = options
        self._whole_in_features = in_features
        self._columns = columns
        self._outputs = dict(outputs)
        self._names = ("weight", "bias") if bias else ("weight",)
        self._parts: dict[tuple[str, str | None], StoredWeight] = {}
        self._kernel: LinearKernel | None = None

    @property
    def kernel(self) -> LinearKernel:
        """What computes the product. Raises IntegrityError before the layer is loaded."""
        if self._kernel is None:
            raise IntegrityError("a linear layer was used before its weights were loaded")
        return self._kernel

    @property
    def nbytes(self) -> int:
        """Memory of weight and bias."""
        return self.kernel.nbytes

    def slots(self) -> Slots:
        """The places for weights and biases, in the order of the outputs."""
        return {(name, part): self._slot(name, part) for name in self._names for part in self._outputs}

    @property
    def native_weight(self) -> NativeLinear | None:
        """The weight in the layout of the native kernels, if that is how it is kept."""
        return self._kernel if isinstance(self._kernel, NativeLinear) else None

    def take_native(self, weight: NativeLinear) -> None:
        """Use a weight that was packed before."""
        self._kernel = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x)

    def _slot(self, name: str, part: str | None) -> Slot:
        output = self._outputs[part]
        if name == "weight":
            shape: tuple[int, ...] = (output.total, self._whole_in_features)
            shard = Shard(output.rows, self._columns)
        else:
            shape, shard = (output.total,), Shard(output.rows)
        return Slot(
            shape, "linear" if name == "weight" else "vector", lambda value: self._take((name, part), value), shard
        )

    def _take(self, key: tuple[str, str | None], value: StoredWeight) -> None:
        self._parts[key] = value
        if len(self._parts) == len(self._names) * len(self._outputs):
            parts, self._parts = self._parts, {}
            weights = [parts["weight", part] for part in self._outputs]
            biases = [as_float(parts["bias", part]) for part in self._outputs] if "bias" in self._names else None
            del parts
            self._kernel = linear_kernel(weights, self._own_bias(biases), self.options)

    def _own_bias(self, biases: Sequence[Tensor] | None) -> Tensor | None:
        """What this rank adds to its product, of the biases of its outputs."""
        return None if biases is None else joined(biases)


class ReplicatedLinear(Linear):
    """The whole weight on every device."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, options: LayerOptions) -> None:
        super().__init__(in_features, {None: Outputs(out_features, 0, out_features)}, bias=bias, options=options)


class ColumnParallelLinear(Linear):
    """Every device has an even share of the output features; its output is that share."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, options: LayerOptions) -> None:
        outputs: dict[str | None, Outputs] = {None: _even_outputs(out_features, "output features of a layer", options)}
        super().__init__(in_features, outputs, bias=bias, options=options)


class RowParallelLinear(Linear):
    """Every device has an even share of the input features, takes that share as its input, and gets the whole output: the sum over all
    devices. The first one adds the bias."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, options: LayerOptions) -> None:
        tensor = options.part.tensor
        columns = None
        if tensor.size > 1:
            columns = even_part(in_features, tensor.rank, tensor.size, "input features of a layer")
        outputs: dict[str | None, Outputs] = {None: Outputs(out_features, 0, out_features)}
        super().__init__(in_features, outputs, bias=bias, options=options, columns=columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.options.part.tensor.all_reduce(self.kernel(x))

    def _own_bias(self, biases: Sequence[Tensor] | None) -> Tensor | None:
        return super()._own_bias(biases) if self.options.part.tensor.rank == 0 else None


class MergedColumnParallelLinear(Linear):
    """Several column-parallel layers with one input as one product. The output holds this device's share of each, side by side, in the
    order of `outputs`, whose sizes are those of all devices together."""

    def __init__(self, in_features: int, outputs: dict[str, int], *, bias: bool, options: LayerOptions) -> None:
        shares: dict[str | None, Outputs] = {
            name: _even_outputs(size, f"output features of its {name} projections", options)
            for name, size in outputs.items()
        }
        super().__init__(in_features, shares, bias=bias, options=options)


class QKVParallelLinear(Linear):
    """Query, key and value projections. Output [T, (H + 2 * KVH) * D]: query heads, key heads, value heads of this device. Devices that
    outnumber the key and value heads have one each, the same as some neighbours."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool, options: LayerOptions
    ) -> None:
        tensor = options.part.tensor
        queries = even_part(num_heads, tensor.rank, tensor.size, "attention heads")
        keys = kv_head_part(num_kv_heads, tensor.rank, tensor.size)
        heads = {"q": (num_heads, queries), "k": (num_kv_heads, keys), "v": (num_kv_heads, keys)}
        outputs: dict[str | None, Outputs] = {
            name: Outputs(total * head_dim, start * head_dim, stop * head_dim)
            for name, (total, (start, stop)) in heads.items()
        }
        super().__init__(hidden_size, outputs, bias=bias, options=options)


def _even_outputs(total: int, what: str, options: LayerOptions) -> Outputs:
    tensor = options.part.tensor
    return Outputs(total, *even_part(total, tensor.rank, tensor.size, what))
