"""Mixtures of experts: a router, and experts of which each token uses a few.

Over several tensor-parallel ranks the experts are divided, not their weights: rank r holds its part of them whole, every rank routes all
tokens alike, computes what its experts give, and the layer's output is the sum over all ranks.

    rank 0   router   experts 0 … 63     ─┐
    rank 1   router   experts 64 … 127   ─┴─ all-reduce ── output

How a step's tokens meet their experts is the business of an `ExpertsKernel`, which is made when the weights have come: one native call on
a CPU, one grouped product on a GPU (layers/gpu_moe.py), and the experts one after another where neither is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from penstock.core.errors import IntegrityError
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.moe import ExpertKernels, NativeExperts, Routing, experts_twin, route
from penstock.execution.layers.activation import silu_and_mul
from penstock.execution.layers.linear import (
    Linear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.partial import PartialModuleList
from penstock.execution.layers.weight import Slots
from penstock.execution.parallel.groups import WHOLE_MODEL
from penstock.execution.parallel.sharding import padded_part

# Expert number → its gate_up and down.
Products = Mapping[int, tuple[Linear, Linear]]


class ExpertsKernel(Protocol):
    """x [T, H] and the router's logits [T, E] → the weighted sum of the outputs of each token's experts, [T, H]; a fresh tensor."""

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor: ...


class Router(ReplicatedLinear):
    """Hidden states → a logit for each expert. Never rounded at load, neither its weight nor what it is multiplied with: a token that goes
    to another expert is a larger error than any rounding of experts."""

    def __init__(self, hidden_size: int, num_experts: int, options: LayerOptions) -> None:
        exact = replace(options, weight_dtype=None, widened_dtype=torch.float32, bf16_arithmetic=False)
        super().__init__(hidden_size, num_experts, bias=False, options=exact)

    def slots(self) -> Slots:
        """The place for the weight."""
        return {place: replace(slot, role="router") for place, slot in super().slots().items()}

    def take_native(self, weight: NativeLinear) -> None:
        """Use a weight that was packed before; activations stay float32."""
        super().take_native(NativeLinear(weight.segments))


class Expert(nn.Module):
    """down(silu(gate(x)) * up(x)), all of it on one device. down_name: what checkpoints call the last product."""

    def __init__(self, hidden_size: int, intermediate_size: int, down_name: str, options: LayerOptions) -> None:
        super().__init__()
        whole = replace(options, part=WHOLE_MODEL, grouped=True)
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, {"gate": intermediate_size, "up": intermediate_size}, bias=False, options=whole
        )
        self.add_module(down_name, RowParallelLinear(intermediate_size, hidden_size, bias=False, options=whole))
        self._down_name = down_name

    @property
    def products(self) -> tuple[Linear, Linear]:
        """gate_up, down."""
        down = self.get_submodule(self._down_name)
        assert isinstance(down, Linear)  # noqa: S101 - it was put there
        return self.gate_up_proj, down


class MixtureOfExperts(nn.Module):
    """Router and experts of one layer, under the names `gate` and `experts`. x is [T, hidden_size]."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        routing: Routing,
        options: LayerOptions,
        *,
        down_name: str = "down_proj",
    ) -> None:
        super().__init__()
        self.routing, self.options = routing, options
        self.sizes = hidden_size, intermediate_size
        self.gate = Router(hidden_size, routing.num_experts, options)
        tensor = options.part.tensor
        present = range(*padded_part(routing.num_experts, tensor.rank, tensor.size))
        self.experts = PartialModuleList(present, lambda _: Expert(hidden_size, intermediate_size, down_name, options))
        self._kernel: ExpertsKernel | None = None

    def finish_loading(self) -> None:
        """Called when all weights have come: makes the kernel, for which weights may have to move."""
        products = {number: self._expert(number).products for number in self.experts.present}
        self._kernel = experts_kernel(products, self.routing, self.sizes, self.options)

    @property
    def kernel(self) -> ExpertsKernel:
        """What computes the experts of this rank. Raises IntegrityError before the layer is loaded."""
        if self._kernel is None:
            raise IntegrityError("a mixture of experts was used before its weights were loaded")
        return self._kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.options.part.tensor.all_reduce(self.kernel(x, self.gate(x)))

    def _expert(self, number: int) -> Expert:
        expert = self.experts[str(number)]
        assert isinstance(expert, Expert)  # noqa: S101 - all are
        return expert


class SeparateExperts:
    """The experts one after another, each with all of its tokens. Waits for the device to know them, so it cannot be recorded."""

    def __init__(self, products: Products, routing: Routing) -> None:
        self._routing = routing
        self._experts = {
            number: ExpertKernels(gate_up.kernel, down.kernel) for number, (gate_up, down) in products.items()
        }

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, chosen = route(logits, self._routing)
        return experts_twin(x, weights, chosen, self._experts, silu_and_mul)


class MaskedExperts:
    """Every expert with every token, most of which count nothing. Slow, but nothing depends on what is in a tensor, so that it can be
    recorded: for weights on a GPU that are not all of one form."""

    def __init__(self, products: Products, routing: Routing, *, triton: bool) -> None:
        self._products, self._routing, self._triton = products, routing, triton

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, chosen = route(logits, self._routing)
        shares = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, chosen, weights)
        output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number, (gate_up, down) in self._products.items():
            result = down.kernel(silu_and_mul(gate_up.kernel(x), triton=self._triton)).float()
            # Not multiplied by zero: an expert may give infinities for tokens that are not its own.
            share = shares[:, number, None]
            output += torch.where(share > 0, result * share, 0.0)
        return output.to(x.dtype)


def experts_kernel(
    products: Products, routing: Routing, sizes: tuple[int, int], options: LayerOptions
) -> ExpertsKernel:
    """The fastest kernel for these experts, by number: gate_up and down of each, consecutive numbers, loaded. sizes: hidden and of an
    expert."""
    pairs = [(gate_up.kernel, down.kernel) for gate_up, down in products.values()]
    native = [(one, other) for one, other in pairs if isinstance(one, NativeLinear) and isinstance(other, NativeLinear)]
    if options.native and len(native) == len(pairs):
        return NativeExperts(routing, min(products, default=0), native, *sizes)
    if products and options.triton:
        from penstock.execution.layers.gpu_moe import grouped_experts

        if (grouped := grouped_experts(products, routing)) is not None:
            return grouped
    if options.triton or options.device.type != "cpu":
        return MaskedExperts(products, routing, triton=options.triton)
    return SeparateExperts(products, routing)
