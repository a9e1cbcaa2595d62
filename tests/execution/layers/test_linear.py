"""Linear layers and their kernels: the same numbers whichever layout the weight is in."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
import torch.nn.functional as F

from penstock.execution.attention.backend import get_attention_backend
from penstock.execution.layers.activation import silu_and_mul
from penstock.execution.layers.embedding import LMHead, VocabEmbedding
from penstock.execution.layers.linear import (
    MergedColumnParallelLinear,
    PackedLinear,
    PlainLinear,
    QKVParallelLinear,
    RowParallelLinear,
    linear_kernel,
    packing_available,
)
from penstock.execution.layers.norm import RMSNorm
from penstock.execution.layers.options import LayerOptions

CPU = torch.device("cpu")
OPTIONS = LayerOptions(torch.float32, CPU, get_attention_backend("auto", CPU))

needs_packing = pytest.mark.skipif(not packing_available(), reason="this torch has no oneDNN")


def test_kernel_follows_the_type() -> None:
    expected = PackedLinear if packing_available() else PlainLinear
    assert isinstance(linear_kernel(torch.zeros(16, 16), None), expected)
    assert isinstance(linear_kernel(torch.zeros(16, 16, dtype=torch.bfloat16), None), PlainLinear)


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
    assert layer.weight is not None
    layer.weight.data.normal_(std=0.02)
    before = process.memory_info().rss
    layer.finish_loading()
    gc.collect()
    assert layer.weight is None
    assert process.memory_info().rss - before < 0.25 * 4096 * 8192 * 4


def test_finish_loading_changes_no_result() -> None:
    layer = MergedColumnParallelLinear(1024, {"gate": 700, "up": 300}, bias=True, options=OPTIONS)
    assert layer.weight is not None
    assert layer.bias is not None
    layer.weight.data.normal_(std=0.02)
    layer.bias.data.normal_()
    x = torch.randn(9, 1024)
    before = layer(x)
    layer.finish_loading()
    layer.finish_loading()
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
    assert list(layer.parameters()) == []


def test_shards_lie_one_after_the_other() -> None:
    layer = QKVParallelLinear(10, num_heads=4, num_kv_heads=2, head_dim=6, bias=True, options=OPTIONS)
    assert layer.weight is not None
    assert layer.bias is not None
    assert layer.weight.shards == layer.bias.shards == {"q": (0, 24), "k": (24, 36), "v": (36, 48)}
    layer.weight.target("q").fill_(1)
    layer.weight.target("k").fill_(2)
    layer.weight.target("v").fill_(3)
    layer.bias.data.zero_()
    assert layer(torch.ones(1, 10)).tolist() == [[10.0] * 24 + [20.0] * 12 + [30.0] * 12]
    with pytest.raises(KeyError):
        layer.weight.target("gate")


@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_embeddings(tied: bool, dtype: torch.dtype, stored_as: torch.dtype) -> None:
    options = LayerOptions(dtype, CPU, OPTIONS.attention_backend)
    embedding = VocabEmbedding(2048, 512, options)
    table = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0)).to(stored_as).to(dtype)
    head = LMHead(2048, 512, options, tied_to=embedding if tied else None)
    assert embedding.weight is not None
    assert head.weight is not None
    assert (head.weight is embedding.weight) is tied
    embedding.weight.data.copy_(table)
    head.weight.data.copy_(table)
    head.finish_loading(embedding, stored_as)
    embedding.finish_loading()

    token_ids = torch.tensor([5, 17, 2047])
    assert torch.equal(embedding(token_ids), table[token_ids])
    logits = head(embedding(token_ids) * 0.05)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, (table[token_ids] * 0.05 @ table.T).float(), atol=1e-4, rtol=1e-2)
    assert [*embedding.parameters(), *head.parameters()] == []


@needs_packing
def test_a_tied_head_is_packed_when_the_lookup_table_can_be_small() -> None:
    def memory(stored_as: torch.dtype, claimed: torch.dtype, rows: int = 9000) -> tuple[int, int]:
        embedding = VocabEmbedding(rows, 512, OPTIONS)
        assert embedding.weight is not None
        embedding.weight.data.copy_(torch.randn(rows, 512).to(stored_as))
        head = LMHead(rows, 512, OPTIONS, tied_to=embedding)
        head.finish_loading(embedding, claimed)
        return embedding.nbytes, head.nbytes

    elements = 9000 * 512
    assert memory(torch.bfloat16, torch.bfloat16) == (2 * elements, 4 * elements)
    assert memory(torch.float32, torch.float32) == (4 * elements, 0)
    assert memory(torch.float32, torch.float32, rows=1000) == (4 * 1000 * 512, 4 * 1000 * 512)
    # A checkpoint whose numbers are finer than config.json says keeps them.
    assert memory(torch.float32, torch.bfloat16) == (4 * elements, 0)


def test_rms_norm_and_gate_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(64, 1e-5, OPTIONS)
    norm.weight.data.normal_(generator=generator)
    x, y = torch.randn(2, 5, 64, generator=generator)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(silu_and_mul(torch.cat((x, y), dim=-1)), F.silu(x) * y)
