"""The layer around the kernels: routing, experts divided over ranks, and kernels for weights of every kind."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.attention.backend import get_attention_backend
from penstock.execution.kernels.linear import NativeLinear, pack_float
from penstock.execution.kernels.moe import NativeExperts, Routing, route
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.triton.moe import GroupedExperts
from penstock.execution.layers.linear import PlainLinear
from penstock.execution.layers.moe import (
    MaskedExperts,
    MixtureOfExperts,
    Router,
    SeparateExperts,
    experts_kernel,
)
from penstock.execution.layers.options import LayerOptions
from penstock.execution.parallel.groups import ModelPart, TensorParallel
from penstock.execution.quantization.rounding import RoundingScheme

CPU = torch.device("cpu")
OPTIONS = LayerOptions(torch.float32, CPU, get_attention_backend("torch", CPU))
NATIVE = dataclasses.replace(OPTIONS, native=True)
TRITON = dataclasses.replace(OPTIONS, triton=True)
HIDDEN, INNER = 64, 32
ROUTING = Routing(5, 2, True)

needs_native = pytest.mark.skipif(not native_available(), reason="no native kernels in this installation")


class Noted:
    """Collectives that keep what one rank gives."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def all_reduce(self, tensor: Tensor) -> None:
        self.given.append(tensor.clone())

    def all_gather(self, tensor: Tensor) -> Tensor:
        raise AssertionError("experts are summed")


def numbers(*shape: int, seed: int) -> Tensor:
    values: Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values / math.sqrt(shape[-1])


def weights(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same for the same name."""
    return numbers(*shape, seed=sum(name.encode()))


def loaded(options: LayerOptions, bits: int | None = None, routing: Routing = ROUTING) -> MixtureOfExperts:
    """A layer whose experts have weights of their numbers; bits: rounded to so many."""
    layer = MixtureOfExperts(HIDDEN, INNER, routing, options)
    for name, module in layer.named_modules():
        for (_, shard), slot in module.slots().items() if hasattr(module, "slots") else ():
            weight = weights(f"{name} {shard}", slot.shape)
            if bits is None or slot.role == "router":
                slot.fill(weight)
                continue
            rounded = RoundingScheme(bits, 32).begin(*slot.shape)
            rounded.put(0, weight)
            slot.fill(rounded.tensor())
    layer.finish_loading()
    return layer


def expected(x: Tensor, routing: Routing = ROUTING) -> Tensor:
    """The layer by its definition, token by token."""
    shares, chosen = route(x @ weights("gate None", (routing.num_experts, HIDDEN)).T, routing)
    rows = []
    for token, row in enumerate(x):
        total = torch.zeros(HIDDEN)
        for share, expert in zip(shares[token].tolist(), chosen[token].tolist(), strict=True):
            gate, up = (weights(f"experts.{expert}.gate_up_proj {part}", (INNER, HIDDEN)) for part in ("gate", "up"))
            down = weights(f"experts.{expert}.down_proj None", (HIDDEN, INNER))
            total += share * (down @ (F.silu(gate @ row) * (up @ row)))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("options", "kernel"),
    [(OPTIONS, SeparateExperts), pytest.param(NATIVE, NativeExperts, marks=needs_native), (TRITON, GroupedExperts)],
)
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_kernel_computes_the_definition(options: LayerOptions, kernel: type, tokens: int) -> None:
    x = numbers(tokens, HIDDEN, seed=1) * 5
    for routing in (ROUTING, Routing(5, 3, False)):
        layer = loaded(options, routing=routing)
        assert isinstance(layer.kernel, kernel)
        torch.testing.assert_close(layer(x), expected(x, routing), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [OPTIONS, pytest.param(NATIVE, marks=needs_native), TRITON])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_their_experts_and_their_outputs_add_up(options: LayerOptions, ranks: int) -> None:
    """Of four ranks the last one has no expert."""
    x = numbers(7, HIDDEN, seed=2) * 5
    total = torch.zeros(7, HIDDEN)
    held: list[int] = []
    for rank in range(ranks):
        noted = Noted()
        part = ModelPart(TensorParallel(rank, ranks, noted))
        layer = loaded(dataclasses.replace(options, part=part))
        layer(x)
        assert len(noted.given) == 1
        total += noted.given[0]
        held += layer.experts.present
    assert held == list(range(5))
    torch.testing.assert_close(total, expected(x), rtol=1e-4, atol=1e-6)


def test_experts_of_several_forms_on_a_gpu_are_masked() -> None:
    """Nothing may wait for the device there, so every expert gets every token."""
    layer = loaded(TRITON)
    products = {number: layer._expert(number).products for number in layer.experts.present}
    products[2][0]._kernel = PlainLinear(products[2][0].kernel(torch.eye(HIDDEN)).T.double().float().contiguous(), None)
    x = numbers(6, HIDDEN, seed=3) * 5
    logits = layer.gate(x)
    masked = MaskedExperts(products, ROUTING, triton=True)
    torch.testing.assert_close(masked(x, logits), expected(x), rtol=1e-4, atol=1e-6)
    mixed = loaded(TRITON, bits=8)
    mixed_products = {number: mixed._expert(number).products for number in mixed.experts.present}
    assert isinstance(experts_kernel(mixed_products, ROUTING, (HIDDEN, INNER), TRITON), GroupedExperts)
    mixed_products[4] = products[4]
    assert isinstance(experts_kernel(mixed_products, ROUTING, (HIDDEN, INNER), TRITON), MaskedExperts)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("options", [pytest.param(NATIVE, marks=needs_native), TRITON])
def test_rounded_experts(options: LayerOptions, bits: int) -> None:
    """Close to the exact ones, in less memory, with a router that is exact."""
    x = numbers(9, HIDDEN, seed=1) * 5
    exact, layer = loaded(options), loaded(options, bits)
    sizes = [
        sum(one.nbytes + other.nbytes for one, other in (m._expert(e).products for e in range(5)))
        for m in (exact, layer)
    ]
    assert sizes[1] < sizes[0]
    assert torch.equal(layer.gate(x), exact.gate(x))
    error = (layer(x) - expected(x)).norm() / expected(x).norm()
    assert error < {8: 0.02, 4: 0.2}[bits]


@needs_native
def test_a_cached_router_stays_exact() -> None:
    """Packed weights from disk come with the arithmetic of the other layers."""
    half = dataclasses.replace(NATIVE, weight_dtype=torch.bfloat16, bf16_arithmetic=True)
    router, cached = Router(HIDDEN, 5, half), Router(HIDDEN, 5, half)
    weight = numbers(5, HIDDEN, seed=0)
    next(iter(router.slots().values())).fill(weight)
    cached.take_native(NativeLinear([pack_float(weight, None)], bf16_arithmetic=True))
    x = numbers(3, HIDDEN, seed=1)
    assert torch.equal(router(x), cached(x))
    torch.testing.assert_close(router(x), x @ weight.T, rtol=1e-5, atol=1e-6)
