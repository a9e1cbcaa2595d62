"""Linear layers, named by how their weight relates to the model's other dimension of size, the number of devices.

    ReplicatedLinear            every device holds the whole weight
    ColumnParallelLinear        output features can be split over devices
      MergedColumnParallelLinear  several such layers with one input, computed as one product (gate and up)
      QKVParallelLinear           query, key and value projections, split by heads
    RowParallelLinear           input features can be split; takes what a ColumnParallelLinear gives

Weights are [out_features, in_features] as in checkpoints. How the product is computed is the business of a `LinearKernel`, which
takes the loaded weight and keeps it in the layout that it likes best.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import Weight


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


def linear_kernel(weight: Tensor, bias: Tensor | None) -> LinearKernel:
    """The fastest kernel for this weight's type and device."""
    return PackedLinear(weight, bias) if packing_pays(weight) else PlainLinear(weight, bias)


def packing_pays(weight: Tensor) -> bool:
    """Whether `linear_kernel` gives this weight a layout of its own."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and packing_available()


def packing_available() -> bool:
    """Whether this build of torch has oneDNN's packed linear operators."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class Linear(nn.Module):
    """y = x @ weight.T + bias, for x [T, in_features]. Call `finish_loading` once the weight is there."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        options: LayerOptions,
        shards: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.weight: Weight | None = Weight((out_features, in_features), options, shards)
        self.bias: Weight | None = Weight((out_features,), options, shards) if bias else None
        self._kernel: LinearKernel = PlainLinear(self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Memory of weight and bias."""
        return self._kernel.nbytes

    def finish_loading(self) -> None:
        """Hand weight and bias to this device's kernel; they are no parameters of this module any more. Idempotent."""
        if self.weight is not None:
            self._kernel = linear_kernel(self.weight.data, None if self.bias is None else self.bias.data)
        self.weight = None
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return self._kernel(x)


class ReplicatedLinear(Linear):
    """The whole weight on every device."""


class ColumnParallelLinear(Linear):
    """Output features can be split over devices."""


class RowParallelLinear(Linear):
    """Input features can be split over devices."""


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several layers with one input as one product. The output holds theirs side by side, in the order of `outputs`."""

    def __init__(self, in_features: int, outputs: dict[str, int], *, bias: bool, options: LayerOptions) -> None:
        shards, end = {}, 0
        for name, size in outputs.items():
            shards[name] = (end, end + size)
            end += size
        super().__init__(in_features, end, bias=bias, options=options, shards=shards)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections. Output [T, (H + 2 * KVH) * D]: query heads, key heads, value heads."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool, options: LayerOptions
    ) -> None:
        outputs = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
        super().__init__(hidden_size, outputs, bias=bias, options=options)
