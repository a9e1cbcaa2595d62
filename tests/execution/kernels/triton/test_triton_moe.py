"""The grouped product of a mixture of experts and what surrounds it, against their twins."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from penstock.execution.kernels.moe import ExpertKernels, Routing, experts_twin
from penstock.execution.kernels.moe import route as route_twin
from penstock.execution.kernels.quantized import CodebookTensor, CompactWeight, Float8Tensor, QuantizedTensor
from penstock.execution.kernels.triton import linear_pack
from penstock.execution.kernels.triton.linear_pack import GPUWeight
from penstock.execution.kernels.triton.moe import GroupedExperts
from penstock.execution.kernels.triton.moe_gemm import (
    GroupedFloats,
    GroupedWeight,
    block_rows,
    group_codes,
    grouped_product,
)
from penstock.execution.kernels.triton.moe_routing import arrange, arrange_twin, mix, most_blocks, route

EXPERTS = 5


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(form: str, rows: int, columns: int, seed: int, device: torch.device) -> GPUWeight:
    """A weight of `form` with random codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    wide = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, columns // 32, generator=generator) + 0.5
    small = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    forms: dict[str, CompactWeight] = {
        "int4": QuantizedTensor(codes, 4, 32, scales / 8, scales),
        "int4 ordered": QuantizedTensor(codes, 4, 32, scales / 8, None, torch.randperm(columns, generator=generator)),
        "int8": QuantizedTensor(wide, 8, columns, scales[:, :1] / 128),
        "codebook": CodebookTensor(codes, torch.linspace(-1, 1, 16), 32, scales),
        "float8": Float8Tensor(small, (1, columns), scales[:, :1]),
    }
    return linear_pack.pack(forms[form], device)


def grouped(form: str, rows: int, columns: int, device: torch.device) -> tuple[GroupedWeight, list[Tensor]]:
    """A weight for every expert, and what they are as float32 with input features in their own order."""
    if form == "floats":
        weights = numbers(EXPERTS, rows, columns).to(device)
        return GroupedFloats(weights), list(weights)
    singles = [packed(form, rows, columns, seed, device) for seed in range(EXPERTS)]
    dense = []
    for single in singles:
        weight = single.dequantize()
        if single.input_order is not None:
            weight = torch.empty_like(weight).index_copy_(1, single.input_order, weight)
        dense.append(weight)
    together = group_codes(singles)
    assert together is not None
    assert all(torch.equal(together.weight(index).words, single.words) for index, single in enumerate(singles))
    return together, dense


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "per_token"), [(4, 2), (6, 3), (9, 1), (4, 4)])
def test_routing(experts: int, per_token: int, renormalize: bool, device: torch.device) -> None:
    routing = Routing(experts, per_token, renormalize)
    logits = numbers(7, experts).to(device)
    weights, chosen = route(logits, routing)
    expected_weights, expected = route_twin(logits, routing)
    assert torch.equal(chosen.long(), expected)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-7)


def test_equal_shares_go_to_the_first_expert_and_nonsense_to_some_expert(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [torch.nan] * 4], device=device)
    weights, chosen = route(logits, Routing(4, 2, True))
    assert chosen[0].tolist() == [1, 2]
    assert weights[0].tolist() == [0.5, 0.5]
    assert 0 <= int(chosen[1].min()) <= int(chosen[1].max()) < 4


@pytest.mark.parametrize(("first", "present"), [(0, 6), (2, 3), (5, 1)])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 16), (40, 16), (600, 32)])
def test_arrangement(tokens: int, rows: int, first: int, present: int, device: torch.device) -> None:
    chosen = route_twin(numbers(tokens, 6, seed=3), Routing(6, 2, True))[1].to(torch.int32)
    actual = arrange(chosen.to(device), first, present, rows)
    expected = arrange_twin(chosen, first, present, rows)
    assert torch.equal(actual.experts.cpu(), expected.experts)
    used = int((expected.experts >= 0).sum()) * rows
    assert torch.equal(actual.slots.cpu()[:used], expected.slots[:used])


def test_there_are_enough_blocks_whatever_tokens_choose() -> None:
    for pairs, experts, rows in ((1, 8, 16), (7, 3, 4), (100, 8, 16), (33, 1, 16)):
        spread = [pairs - min(pairs, experts) + 1, *[1] * (min(pairs, experts) - 1)]
        assert sum(-(-count // rows) for count in spread) <= most_blocks(pairs, experts, rows)


@pytest.mark.parametrize("form", ["floats", "int4", "int4 ordered", "int8", "codebook", "float8"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_grouped_product(form: str, tokens: int, device: torch.device) -> None:
    weight, dense = grouped(form, 40, 96, device)
    chosen = route_twin(numbers(tokens, EXPERTS), Routing(EXPERTS, 2, True))[1].to(torch.int32).to(device)
    x = numbers(tokens, 96, seed=1).to(device)
    arrangement = arrange(chosen, 1, EXPERTS - 1, 16)
    # Experts are counted from the first one that is here, so that expert 1 has the first weight.
    output = torch.full((tokens * 2, 40), 7.0, device=device)
    grouped_product(x, weight, arrangement, output, 2)
    for pair, expert in enumerate(chosen.flatten().tolist()):
        expected = torch.full((40,), 7.0, device=device) if expert == 0 else dense[expert - 1] @ x[pair // 2]
        torch.testing.assert_close(output[pair], expected, rtol=1e-4, atol=2e-3)


def test_weighted_sum_leaves_out_experts_that_are_elsewhere(device: torch.device) -> None:
    weights, chosen = route(numbers(3, 4).to(device), Routing(4, 2, True))
    results = numbers(6, 10).to(device)
    here = (chosen >= 1) & (chosen < 3)
    spoiled = torch.where(here.flatten()[:, None], results, torch.nan)
    expected = (results.view(3, 2, 10) * (weights * here)[:, :, None]).sum(1)
    torch.testing.assert_close(mix(spoiled, weights, chosen, 1, 2), expected)


@pytest.mark.parametrize(("form", "first"), [("floats", 0), ("floats", 2), ("int8", 0)])
def test_all_of_it(form: str, first: int, device: torch.device) -> None:
    routing = Routing(EXPERTS + first, 2, True)
    gate_up, gate_up_dense = grouped(form, 2 * 32, 64, device)
    down, down_dense = grouped(form, 64, 32, device)
    x, logits = numbers(9, 64, seed=5).to(device), numbers(9, routing.num_experts, seed=6).to(device)
    actual = GroupedExperts(routing, first, EXPERTS, gate_up, down)(x, logits)
    kernels = {
        first + index: ExpertKernels(lambda rows, w=one: rows @ w.T, lambda rows, w=other: rows @ w.T)  # type: ignore[misc]
        for index, (one, other) in enumerate(zip(gate_up_dense, down_dense, strict=True))
    }
    expected = experts_twin(x, *route_twin(logits, routing), kernels)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert GroupedExperts(routing, first, EXPERTS, gate_up, down)(x[:0], logits[:0]).shape == (0, 64)


def test_weights_of_several_forms_are_not_grouped(device: torch.device) -> None:
    assert group_codes([packed(form, 16, 64, 0, device) for form in ("int4", "int8")]) is None
    one = packed("codebook", 16, 64, 0, device)
    assert one.codebook is not None
    assert group_codes([one, dataclasses.replace(one, codebook=one.codebook * 2)]) is None


def test_blocks_grow_with_the_rows_of_an_expert(device: torch.device) -> None:
    assert block_rows(16, 8, torch.bfloat16, device) == 16
    assert block_rows(400, 8, torch.bfloat16, device) == 64
    assert block_rows(10**5, 8, torch.float32, device) == 32
