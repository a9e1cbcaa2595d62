"""Linear layers and their kernels: the same numbers whichever layout the weight is in."""

from __future__ import annotations

import dataclasses
import gc

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.execution.attention.backend import get_attention_backend
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.quantized import QuantizedTensor
from penstock.execution.layers.activation import silu_and_mul
from penstock.execution.layers.embedding import LMHead, VocabEmbedding
from penstock.execution.layers.linear import (
    Linear,
    PackedLinear,
    PlainLinear,
    QKVParallelLinear,
    RowParallelLinear,
    linear_kernel,
    packing_available,
)
from penstock.execution.layers.norm import RMSNorm
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import as_float

CPU = torch.device("cpu")
OPTIONS = LayerOptions(torch.float32, CPU, get_attention_backend("torch", CPU))
HALF = dataclasses.replace(OPTIONS, dtype=torch.bfloat16)
NATIVE = dataclasses.replace(OPTIONS, native=True)

needs_native = pytest.mark.skipif(not native_available(), reason="no native kernels in this installation")
needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch has no oneDNN")


def fill(layer: Linear, **shards: Tensor) -> None:
    """Give a layer its tensors: `weight` and `bias`, or `weight_q`, `bias_q` and so on."""
    for (name, shard), slot in layer.slots().items():
        slot.fill(shards[name if shard is None else f"{name}_{shard}"])


def test_kernel_follows_the_type() -> None:
    expected = PackedLinear if packing_available() else PlainLinear
    assert isinstance(linear_kernel([torch.zeros(16, 16)], None, OPTIONS), expected)
    assert isinstance(linear_kernel([torch.zeros(16, 16)], None, HALF), PlainLinear)


@needs_packing
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="measured with AVX-512 only")
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (512, 256), (1000, 896)])
def test_a_token_has_the_same_result_in_every_batch(outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = PackedLinear(torch.randn(outputs, inputs, generator=generator), None)
    x = torch.randn(256, inputs, generator=generator)
    expected = kernel(x)
    for tokens in (1, 2, 3, 8, 17, 33, 64, 100):
        assert torch.equal(kernel(x[:tokens]), expected[:tokens])


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 65, 300])
def test_packed_equals_plain(tokens: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(1000, 600, generator=generator) * 0.04
    offset = torch.randn(1000, generator=generator) if bias else None
    x = torch.randn(tokens, 600, generator=generator)
    torch.testing.assert_close(PackedLinear(weight, offset)(x), F.linear(x, weight, offset), atol=1e-5, rtol=1e-5)
    strided = torch.cat((x, x), dim=-1)[:, :600]
    torch.testing.assert_close(PackedLinear(weight, offset)(strided), F.linear(x, weight, offset), atol=1e-5, rtol=1e-5)


@needs_packing
def test_packing_replaces_the_weight_and_does_not_add_to_it() -> None:
    process = psutil.Process()
    layer = RowParallelLinear(8192, 4096, bias=False, options=OPTIONS)
    gc.collect()
    before = process.memory_info().rss
    fill(layer, weight=torch.full((4096, 8192), 0.5))
    gc.collect()
    assert layer.nbytes == 4096 * 8192 * 4
    assert process.memory_info().rss - before < 1.25 * 4096 * 8192 * 4


@pytest.mark.parametrize("options", [OPTIONS, pytest.param(NATIVE, marks=needs_native)])
def test_shards_lie_one_after_the_other(options: LayerOptions) -> None:
    layer = QKVParallelLinear(10, num_heads=4, num_kv_heads=2, head_dim=6, bias=True, options=options)
    assert {key: slot.shape for key, slot in layer.slots().items()} == {
        ("weight", "q"): (24, 10),
        ("weight", "k"): (12, 10),
        ("weight", "v"): (12, 10),
        ("bias", "q"): (24,),
        ("bias", "k"): (12,),
        ("bias", "v"): (12,),
    }
    with pytest.raises(IntegrityError, match="before its weights were loaded"):
        layer(torch.ones(1, 10))
    fill(
        layer,
        weight_v=torch.full((12, 10), 3.0),
        weight_q=torch.full((24, 10), 1.0),
        weight_k=torch.full((12, 10), 2.0),
        bias_k=torch.full((12,), 0.5),
        bias_q=torch.zeros(24),
        bias_v=torch.full((12,), -1.0),
    )
    assert layer(torch.ones(1, 10)).tolist() == [[10.0] * 24 + [20.5] * 12 + [29.0] * 12]
    assert list(layer.parameters()) == []


def quantized(
    rows: int, columns: int, group: int, bits: int = 4, *, offsets: bool = False, seed: int = 0
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, columns // group, generator=generator) * 0.01 + 0.01
    return QuantizedTensor(codes, bits, group, scales.half().float(), scales.half().float() * 6 if offsets else None)


@needs_native
@pytest.mark.parametrize(
    ("parts", "segments"),
    [
        ([torch.ones(16, 64), torch.ones(32, 64)], [("float32", 48)]),
        ([torch.ones(16, 64), torch.ones(32, 64).bfloat16()], [("float32", 16), ("bfloat16", 32)]),
        ([quantized(16, 64, 32), quantized(16, 64, 32)], [("int4", 32)]),
        ([quantized(16, 64, 32), quantized(16, 64, 64), quantized(16, 64, 64)], [("int4", 16), ("int4", 32)]),
        ([quantized(16, 64, 32), quantized(16, 64, 32, offsets=True)], [("int4", 16), ("int4", 16)]),
        ([quantized(16, 64, 32), quantized(16, 64, 32, 8), torch.ones(16, 64).half()], [("int4", 16), ("int8", 16), ("float16", 16)]),
        ([quantized(16, 64, 64, offsets=True)], [("int4", 16)]),
        ([quantized(16, 24, 24, offsets=True)], [("float32", 16)]),
        ([torch.ones(16, 64), torch.ones(16, 64).half()] * 2, [("float32", 64)]),
    ],
)  # fmt: skip
def test_consecutive_parts_of_one_kind_become_one_segment(
    parts: list[Tensor | QuantizedTensor], segments: list[tuple[str, int]]
) -> None:
    kernel = linear_kernel(parts, None, NATIVE)
    assert isinstance(kernel, NativeLinear)
    assert [(segment.kind, segment.out_features) for segment in kernel.segments] == segments
    rows = kernel.dequantize_rows(torch.arange(kernel.out_features))
    torch.testing.assert_close(rows, torch.cat([as_float(part).float() for part in parts]), rtol=1e-3, atol=1e-4)


@needs_native
def test_parts_with_orders_of_their_own_stay_segments() -> None:
    parts = [quantized(16, 64, 32, seed=seed) for seed in range(3)]
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    parts = [dataclasses.replace(part, input_order=order) for part, order in zip(parts, orders, strict=True)]
    kernel = linear_kernel(parts, torch.arange(48.0), NATIVE)
    assert isinstance(kernel, NativeLinear)
    assert [segment.out_features for segment in kernel.segments] == [32, 16]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = x @ torch.cat([part.dequantize() for part in parts]).T + torch.arange(48.0)
    assert (kernel(x) - expected).abs().max() < 0.03 * expected.std()


@needs_native
def test_float_weights_keep_their_type_unless_told_otherwise() -> None:
    half = dataclasses.replace(NATIVE, weight_dtype=torch.bfloat16, bf16_arithmetic=True)
    for options, stored, kind in (
        (NATIVE, torch.float16, "float16"),
        (NATIVE, torch.float32, "float32"),
        (half, torch.float32, "bfloat16"),
    ):
        layer = RowParallelLinear(64, 32, bias=False, options=options)
        fill(layer, weight=torch.ones(32, 64, dtype=stored))
        assert layer.native_weight is not None
        assert layer.native_weight.segments[0].kind == kind


@pytest.mark.parametrize("options", [OPTIONS, HALF, pytest.param(NATIVE, marks=needs_native)])
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_embeddings(tied: bool, options: LayerOptions, stored_as: torch.dtype) -> None:
    embedding = VocabEmbedding(2048, 512, options)
    table = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0)).to(stored_as)
    head = LMHead(2048, 512, options, tied_to=embedding if tied else None)
    assert [slot.role for slot in embedding.slots().values()] == ["head" if tied else "table"]
    assert len(head.slots()) == (0 if tied else 1)
    for slot in (*embedding.slots().values(), *head.slots().values()):
        slot.fill(table)

    token_ids = torch.tensor([5, 17, 2047])
    expected = table[token_ids].to(options.dtype)
    assert torch.equal(embedding(token_ids), expected)
    logits = head(embedding(token_ids) * 0.05)
    assert logits.dtype == torch.float32
    reference = (expected.float() * 0.05) @ table.float().T
    torch.testing.assert_close(logits, reference, atol=1e-4 if options.dtype == torch.float32 else 0.05, rtol=1e-2)
    assert [*embedding.parameters(), *head.parameters()] == []


@needs_packing
def test_a_tied_head_is_packed_when_the_lookup_table_can_be_small() -> None:
    def memory(stored_as: torch.dtype, rows: int = 9000) -> tuple[int, int]:
        embedding = VocabEmbedding(rows, 512, OPTIONS)
        head = LMHead(rows, 512, OPTIONS, tied_to=embedding)
        embedding.slots()["weight", None].fill(torch.zeros(rows, 512, dtype=stored_as))
        return embedding.nbytes, head.nbytes

    elements = 9000 * 512
    assert memory(torch.bfloat16) == (2 * elements, 4 * elements)
    assert memory(torch.float32) == (4 * elements, 0)
    assert memory(torch.float32, rows=1000) == (4 * 1000 * 512, 4 * 1000 * 512)


@needs_native
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_table_is_looked_up_as_it_is(tied: bool) -> None:
    embedding = VocabEmbedding(64, 32, NATIVE)
    head = LMHead(64, 32, NATIVE, tied_to=embedding if tied else None)
    table = quantized(64, 32, 32, 8)
    embedding.slots()["weight", None].fill(table)
    token_ids = torch.tensor([3, 63, 0])
    torch.testing.assert_close(embedding(token_ids), table.dequantize()[token_ids], rtol=1e-6, atol=0)
    if tied:
        assert embedding.nbytes == 0
        assert head.nbytes == 64 * 32 + 64 * 4
    else:
        assert embedding.nbytes == 64 * 32 + 64 * 4


def test_rms_norm_and_gate_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(64, 1e-5, OPTIONS)
    norm.weight.data.normal_(generator=generator)
    x, y = torch.randn(2, 5, 64, generator=generator)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(silu_and_mul(torch.cat((x, y), dim=-1)), F.silu(x) * y)
