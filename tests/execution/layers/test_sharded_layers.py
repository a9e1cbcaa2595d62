"""Layers that several ranks share: who holds which part of a tensor, and that their results together are the whole layer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.execution.attention.backend import get_attention_backend
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.quantized import QuantizedTensor, StoredWeight
from penstock.execution.layers.embedding import LMHead, VocabEmbedding
from penstock.execution.layers.linear import (
    ColumnParallelLinear,
    Linear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from penstock.execution.layers.mlp import GatedMLP
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import WeightHolder
from penstock.execution.parallel.groups import ModelPart, TensorParallel
from penstock.execution.parallel.sharding import WHOLE
from penstock.testing.ranks import Meeting, ThreadCollectives, part_of, run_ranks

CPU = torch.device("cpu")
OPTIONS = LayerOptions(torch.float32, CPU, get_attention_backend("torch", CPU))
NATIVE = replace(OPTIONS, native=True)

needs_native = pytest.mark.skipif(not native_available(), reason="no native kernels in this installation")
EVERYWHERE = [OPTIONS, pytest.param(NATIVE, marks=needs_native)]

Weights = Mapping[tuple[str, str | None], Tensor]


def ranked(size: int, options: LayerOptions = OPTIONS) -> tuple[list[LayerOptions], Meeting]:
    meeting = Meeting(size)
    tensors = [TensorParallel(rank, size, ThreadCollectives(rank, meeting)) for rank in range(size)]
    return [replace(options, part=ModelPart(tensor)) for tensor in tensors], meeting


def random_weights(layer: WeightHolder) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(slot.shape, generator=generator) for key, slot in layer.slots().items()}


def fill(layer: WeightHolder, weights: Weights) -> None:
    for key, slot in layer.slots().items():
        slot.fill(part_of(weights[key], slot))


def quantized(weight: Tensor) -> QuantizedTensor:
    """8 bits, one scale per output feature."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().add(128).to(torch.uint8)
    return QuantizedTensor(codes, 8, weight.shape[1], scales)


LAYERS: dict[str, Callable[[LayerOptions], Linear]] = {
    "column": lambda options: ColumnParallelLinear(32, 48, bias=True, options=options),
    "merged": lambda options: MergedColumnParallelLinear(32, {"gate": 16, "up": 48}, bias=True, options=options),
    "qkv": lambda options: QKVParallelLinear(32, 8, 4, 16, bias=True, options=options),
    "row": lambda options: RowParallelLinear(32, 48, bias=False, options=options),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_number_is_at_one_rank(layer: str, size: int) -> None:
    whole = LAYERS[layer](OPTIONS)
    options, _ = ranked(size)
    for key, slot in whole.slots().items():
        assert slot.shard == WHOLE
        holders = torch.zeros(slot.shape, dtype=torch.int64)
        for option in options:
            place = LAYERS[layer](option).slots()[key]
            assert place.shape == slot.shape
            shard = place.shard
            rows, columns = slice(*shard.rows or (None,)), slice(*shard.columns or (None,))
            part = holders[rows] if holders.ndim == 1 else holders[rows, columns]
            part += 1
            assert tuple(part.shape) == shard.shape(slot.shape)
        assert (holders == 1).all()


@pytest.mark.parametrize("options", EVERYWHERE)
def test_heads_that_ranks_outnumber_are_shared_by_neighbours(options: LayerOptions) -> None:
    whole = QKVParallelLinear(32, 8, 2, 16, bias=True, options=options)
    weights = random_weights(whole)
    fill(whole, weights)
    x = torch.randn(5, 32)
    heads = whole(x).view(5, 12, 16)
    for rank, part in enumerate(ranked(4, options)[0]):
        layer = QKVParallelLinear(32, 8, 2, 16, bias=True, options=part)
        fill(layer, weights)
        key = rank // 2
        expected = torch.cat((heads[:, 2 * rank : 2 * rank + 2], heads[:, [8 + key, 10 + key]]), dim=1)
        assert layer.out_features == 4 * 16
        torch.testing.assert_close(layer(x).view(5, 4, 16), expected)


@pytest.mark.parametrize("options", EVERYWHERE)
def test_the_sum_over_input_features_has_one_bias(options: LayerOptions) -> None:
    whole = RowParallelLinear(64, 24, bias=True, options=options)
    weights = random_weights(whole)
    fill(whole, weights)
    x = torch.randn(5, 64)
    parts, meeting = ranked(4, options)
    layers = [RowParallelLinear(64, 24, bias=True, options=part) for part in parts]
    for layer in layers:
        fill(layer, weights)
        assert (layer.in_features, layer.out_features) == (16, 24)
    shares = x.chunk(4, dim=1)
    results = run_ranks([partial(layer, share) for layer, share in zip(layers, shares, strict=True)], meeting)
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], whole(x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("options", EVERYWHERE)
def test_feed_forward_block(options: LayerOptions) -> None:
    whole = GatedMLP(32, 48, bias=True, options=options)
    parts, meeting = ranked(3, options)
    blocks = [GatedMLP(32, 48, bias=True, options=part) for part in parts]
    for name in ("gate_up_proj", "down_proj"):
        weights = random_weights(getattr(whole, name))
        for block in (whole, *blocks):
            fill(getattr(block, name), weights)
    x = torch.randn(7, 32)
    results = run_ranks([partial(block, x) for block in blocks], meeting)
    torch.testing.assert_close(results[0], whole(x), atol=2e-3, rtol=1e-5)


def test_replicated_layers_are_whole_everywhere() -> None:
    layer = ReplicatedLinear(7, 5, bias=False, options=ranked(2)[0][1])
    assert [slot.shard for slot in layer.slots().values()] == [WHOLE]
    assert (layer.in_features, layer.out_features) == (7, 5)


@needs_native
def test_output_features_of_integers_have_the_bits_of_the_whole() -> None:
    weight = quantized(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)))
    whole = ColumnParallelLinear(96, 64, bias=False, options=NATIVE)
    whole.slots()["weight", None].fill(weight)
    x = torch.randn(9, 96)
    outputs = []
    for part in ranked(4, NATIVE)[0]:
        layer = ColumnParallelLinear(96, 64, bias=False, options=part)
        slot = layer.slots()["weight", None]
        assert slot.shard.rows is not None
        slot.fill(weight.rows(*slot.shard.rows))
        outputs.append(layer(x))
    assert torch.equal(torch.cat(outputs, dim=1), whole(x))


def stored(weight: Tensor, kind: str) -> tuple[StoredWeight, Callable[[int, int], StoredWeight], Tensor]:
    """A table, its rows from one to another, and the numbers that it means."""
    if kind == "float":
        return weight, lambda start, stop: weight[start:stop].clone(), weight
    integers = quantized(weight)
    return integers, integers.rows, integers.dequantize()


# 75 tokens are 38 and 37 for two ranks, and 19, 19, 19 and 18 for four.
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("options", EVERYWHERE)
def test_vocabulary(options: LayerOptions, kind: str, tied: bool, size: int) -> None:
    _, rows, numbers = stored(torch.randn(75, 32, generator=torch.Generator().manual_seed(2)), kind)
    parts, meeting = ranked(size, options)
    ids = torch.tensor([0, 74, 37, 38, 18, 19, 57, 56])

    def one(part: LayerOptions) -> Callable[[], Tensor]:
        embedding = VocabEmbedding(75, 32, part)
        head = LMHead(75, 32, part, tied_to=embedding if tied else None)
        for layer in (embedding, head):
            for slot in layer.slots().values():
                slot.fill(rows(*slot.shard.rows or (0, 75)))

        def run() -> Tensor:
            vectors = embedding(ids)
            logits = head(vectors)
            out = torch.empty(8, 75)
            assert head(vectors, out) is out
            assert torch.equal(out, logits)
            assert logits.is_contiguous()
            return torch.cat((vectors, logits), dim=1)

        return run

    results = run_ranks([one(part) for part in parts], meeting)
    assert all(torch.equal(result, results[0]) for result in results)
    vectors, logits = results[0][:, :32], results[0][:, 32:]
    torch.testing.assert_close(vectors, numbers[ids], rtol=0, atol=1e-6)
    # Integers meet inputs that are rounded as well.
    atol = 0.5 if kind == "int8" and options.native else 1e-4
    torch.testing.assert_close(logits, F.linear(numbers[ids], numbers), rtol=0, atol=atol)


@pytest.mark.parametrize("options", EVERYWHERE)
def test_a_table_that_is_only_the_heads(options: LayerOptions) -> None:
    weight = torch.randn(75, 32, generator=torch.Generator().manual_seed(3))
    embedding = VocabEmbedding(75, 32, options, lookups=False)
    head = LMHead(75, 32, options, tied_to=embedding)
    [slot] = embedding.slots().values()
    assert (slot.role, head.slots()) == ("head", {})
    slot.fill(weight)
    assert embedding.nbytes == 0
    assert head.nbytes > 0
    x = torch.randn(4, 32)
    torch.testing.assert_close(head(x), F.linear(x, weight))
