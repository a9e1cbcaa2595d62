"""Linear layers, named by how their weight relates to the model's other dimension of size, the number of devices.

    ReplicatedLinear            every device holds the whole weight
    ColumnParallelLinear        output features can be split over devices
      MergedColumnParallelLinear  several such layers with one input, computed as one product (gate and up)
      QKVParallelLinear           query, key and value projections, split by heads
    RowParallelLinear           input features can be split; takes what a ColumnParallelLinear gives

Weights are [out_features, in_features] as in checkpoints, plain or quantised. How the product is computed is the business of a
`LinearKernel`, which is made when the last tensor of a layer has come, and keeps the weight in the layout that it likes best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.linear import MAX_SEGMENTS, NativeLinear, PackedWeight, pack_float, pack_quantized
from penstock.execution.kernels.quantized import QuantizedTensor, StoredWeight
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import Slot, Slots, as_float, float_copy

# Input features that share a scale: a multiple of this.
_SMALLEST_GROUP = 16


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
        return _native_kernel(parts, bias, options)
    if options.triton:
        from penstock.execution.layers.gpu_linear import gpu_linear_kernel

        return gpu_linear_kernel(parts, bias, options)
    weight = _joined([as_float(part).to(options.device, options.dtype) for part in parts])
    bias = None if bias is None else bias.to(options.device, options.dtype)
    return PackedLinear(weight, bias) if packing_pays(weight) else PlainLinear(weight, bias)


def _native_kernel(parts: Sequence[StoredWeight], bias: Tensor | None, options: LayerOptions) -> NativeLinear:
    segments = list(_segments([_computable(part, options) for part in parts]))
    if len(segments) > MAX_SEGMENTS:
        segments = [_joined([as_float(part).to(torch.float32) for part in segments])]
    packed, start = [], 0
    for segment in segments:
        stop = start + segment.shape[0]
        packed.append(_pack(segment, None if bias is None else bias[start:stop].to(torch.float32)))
        start = stop
    return NativeLinear(packed, bf16_arithmetic=options.bf16_arithmetic)


def _pack(weight: Tensor | QuantizedTensor, bias: Tensor | None) -> PackedWeight:
    return pack_quantized(weight, bias) if isinstance(weight, QuantizedTensor) else pack_float(weight, bias)


def _computable(part: StoredWeight, options: LayerOptions) -> Tensor | QuantizedTensor:
    """The part as native kernels can compute with it; the same numbers, unless options ask for another float type."""
    if isinstance(part, Tensor):
        return part if options.weight_dtype is None else part.to(options.weight_dtype)
    if not isinstance(part, QuantizedTensor):
        # No native kernel computes with 8-bit floats or codebooks, and integers would round them again.
        return float_copy(part, options.widened_dtype)
    # Kernels have offsets with groups only, so that one offset per output feature is spread over groups, for which there must be a size.
    rowwise = part.offsets is not None and part.group_size == part.shape[1]
    return part.dequantize() if rowwise and part.shape[1] % _SMALLEST_GROUP else part


def _segments(parts: Sequence[Tensor | QuantizedTensor]) -> Iterator[Tensor | QuantizedTensor]:
    """The parts, with consecutive ones of one kind joined."""
    start = 0
    for stop in range(1, len(parts) + 1):
        if stop == len(parts) or not _joinable(parts[start], parts[stop]):
            run = parts[start:stop]
            floats = [part for part in run if isinstance(part, Tensor)]
            yield _joined(floats) if floats else _joined_quantized([p for p in run if isinstance(p, QuantizedTensor)])
            start = stop


def _joinable(one: Tensor | QuantizedTensor, other: Tensor | QuantizedTensor) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
    if (one.bits, one.group_size, one.offsets is None) != (other.bits, other.group_size, other.offsets is None):
        return False
    if one.input_order is None or other.input_order is None:
        return one.input_order is other.input_order
    return torch.equal(one.input_order, other.input_order)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _joined_quantized(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    first = parts[0]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return QuantizedTensor(
        _joined([part.codes for part in parts]),
        first.bits,
        first.group_size,
        _joined([part.scales for part in parts]),
        _joined(offsets) if offsets else None,
        first.input_order,
    )


def packing_pays(weight: Tensor) -> bool:
    """Whether `linear_kernel` gives this weight a layout of its own."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and packing_available()


def packing_available() -> bool:
    """Whether this build of torch has oneDNN's packed linear operators."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class Linear(nn.Module):
    """y = x @ weight.T + bias, for x [T, in_features].

    shards: the output features [start, end) of each tensor of the checkpoint, where several make up this layer. What has come is kept as
    it is until the last one comes; then the kernel is made of all of them.
    """

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
        self.in_features, self.out_features = in_features, out_features
        self.options = options
        self._rows: dict[str | None, int] = {None: out_features}
        if shards:
            self._rows = {name: end - start for name, (start, end) in shards.items()}
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
        return {
            (name, shard): Slot(
                (rows, self.in_features) if name == "weight" else (rows,),
                "linear" if name == "weight" else "vector",
                lambda value, key=(name, shard): self._take(key, value),  # type: ignore[misc]
            )
            for name in self._names
            for shard, rows in self._rows.items()
        }

    @property
    def native_weight(self) -> NativeLinear | None:
        """The weight in the layout of the native kernels, if that is how it is kept."""
        return self._kernel if isinstance(self._kernel, NativeLinear) else None

    def take_native(self, weight: NativeLinear) -> None:
        """Use a weight that was packed before."""
        self._kernel = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x)

    def _take(self, key: tuple[str, str | None], value: StoredWeight) -> None:
        self._parts[key] = value
        if len(self._parts) == len(self._names) * len(self._rows):
            parts, self._parts = self._parts, {}
            weights = [parts["weight", shard] for shard in self._rows]
            biases = [as_float(parts["bias", shard]) for shard in self._rows] if "bias" in self._names else None
            del parts
            self._kernel = linear_kernel(weights, None if biases is None else _joined(biases), self.options)


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
