"""What a stored weight becomes on a GPU: which kernel, what it computes, what it takes; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.execution.attention.backend import get_attention_backend
from penstock.execution.kernels.quantized import CodebookTensor, Float8Tensor, QuantizedTensor, StoredWeight
from penstock.execution.kernels.torch_int4 import TorchInt4Linear, torch_int4_supports
from penstock.execution.kernels.triton.fp8 import Float8Linear
from penstock.execution.kernels.triton.linear import TritonLinear
from penstock.execution.kernels.triton.support import interpreted, triton_runs_on
from penstock.execution.layers import gpu_linear
from penstock.execution.layers.embedding import LMHead, VocabEmbedding
from penstock.execution.layers.gpu_linear import SegmentedLinear, gpu_linear_kernel
from penstock.execution.layers.linear import LinearKernel, MergedColumnParallelLinear, PlainLinear
from penstock.execution.layers.linear_choice import LinearChoices, LinearShape
from penstock.execution.layers.options import LayerOptions
from penstock.execution.layers.weight import as_float
from penstock.execution.models.registry import load_model
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel

pytestmark = pytest.mark.skipif(
    not (interpreted() and triton_runs_on(torch.device("cpu"))), reason="kernels are not interpreted on this machine"
)

CPU = torch.device("cpu")
OPTIONS = LayerOptions(torch.float32, CPU, get_attention_backend("torch", CPU), triton=True)
K = 128


def integers(rows: int, bits: int, group: int = K, *, seed: int = 0, **more: Any) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, K), dtype=torch.uint8, generator=generator)
    # Of sixteen bits, so that packing rounds nothing.
    scales = ((torch.rand(rows, K // group, generator=generator) + 0.1) * 0.01).bfloat16().float()
    return QuantizedTensor(codes, bits, group, scales, **more)


def float8(
    rows: int, block: tuple[int, int], scales: Tensor, activation_scale: float | None = None, columns: int = K
) -> Float8Tensor:
    codes = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 60).to(torch.float8_e4m3fn)
    return Float8Tensor(codes, block, scales, activation_scale)


def nf4(rows: int) -> CodebookTensor:
    codes = torch.randint(0, 16, (rows, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return CodebookTensor(codes, torch.linspace(-1, 1, 16), 64, torch.full((rows, 2), 0.125))


def inputs(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


def expect(kernel: LinearKernel, parts: Sequence[StoredWeight], bias: Tensor | None = None) -> None:
    """The kernel's numbers are those of the dequantised parts."""
    weight = torch.cat([as_float(part) for part in parts])
    for tokens in (0, 1, 5):
        x = inputs(tokens, weight.shape[1])
        torch.testing.assert_close(kernel(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "parts",
    [
        [integers(8, 4, 32), integers(5, 4, 32, seed=1)],
        [integers(8, 8), integers(5, 8, seed=1), integers(3, 8, seed=2)],
        [integers(6, 4, 64, offsets=torch.full((6, 2), 0.0625)), integers(4, 4, 64, offsets=torch.zeros(4, 2))],
        [nf4(8), nf4(3)],
    ],
    ids=["int4", "int8", "offsets", "nf4"],
)
def test_parts_of_one_form_are_one_weight(parts: list[StoredWeight]) -> None:
    bias = torch.linspace(-1, 1, sum(part.shape[0] for part in parts))
    kernel = gpu_linear_kernel(parts, bias, OPTIONS)
    assert isinstance(kernel, TritonLinear)
    expect(kernel, parts, bias)


def test_parts_of_several_forms_are_several_products() -> None:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    integer_parts = [integers(8, 4, 32), integers(5, 4, 32, input_order=order), integers(4, 8)]
    parts: list[StoredWeight] = [*integer_parts, torch.ones(3, K), nf4(2)]
    bias = torch.linspace(-1, 1, 22)
    kernel = gpu_linear_kernel(parts, bias, OPTIONS)
    assert isinstance(kernel, SegmentedLinear)
    assert [type(part) for part in kernel.kernels] == [TritonLinear] * 3 + [PlainLinear, TritonLinear]
    assert kernel.nbytes == sum(part.nbytes for part in kernel.kernels)
    expect(kernel, parts, bias)


def test_floats_are_one_plain_weight() -> None:
    parts = [torch.ones(3, K, dtype=torch.bfloat16), torch.zeros(2, K)]
    kernel = gpu_linear_kernel(parts, None, OPTIONS)
    assert isinstance(kernel, PlainLinear)
    expect(kernel, parts)


def test_groups_that_kernels_do_not_have_become_floats() -> None:
    weight = CodebookTensor(torch.ones(4, K, dtype=torch.uint8), torch.linspace(-1, 1, 16), 8, torch.ones(4, K // 8))
    kernel = gpu_linear_kernel([weight], None, OPTIONS)
    assert isinstance(kernel, PlainLinear)
    expect(kernel, [weight])


def test_scales_of_whole_tensors_become_scales_of_rows() -> None:
    parts = [float8(16, (16, K), torch.tensor([[0.002]]), 0.5), float8(32, (32, K), torch.tensor([[0.001]]), 0.25)]
    kernel = gpu_linear_kernel(parts, None, OPTIONS)
    assert isinstance(kernel, Float8Linear)
    assert kernel.activation_scale == 0.5
    expect(kernel, parts)


def test_blocks_of_scales() -> None:
    scales = torch.tensor([[0.002, 0.003]])
    joined = [float8(rows, (128, 128), scales * rows / 128, columns=2 * K) for rows in (128, 50)]
    kernel = gpu_linear_kernel(joined, None, OPTIONS)
    assert isinstance(kernel, TritonLinear)
    expect(kernel, joined)
    # A block must not reach into the next part.
    apart = joined[::-1]
    kernel = gpu_linear_kernel(apart, None, OPTIONS)
    assert isinstance(kernel, SegmentedLinear)
    expect(kernel, apart)


def test_memory_is_that_of_the_codes() -> None:
    kernel = gpu_linear_kernel([integers(64, 4, 32)], torch.zeros(64), OPTIONS)
    assert kernel.nbytes == 64 * K // 2 + 64 * K // 32 * 2 + 64 * 4


def test_a_layer_of_quantised_shards() -> None:
    layer = MergedColumnParallelLinear(K, {"gate": 8, "up": 8}, bias=False, options=OPTIONS)
    parts = {"gate": integers(8, 4, 32), "up": integers(8, 4, 32, seed=1)}
    for (_, shard), slot in layer.slots().items():
        slot.fill(parts[str(shard)])
    assert isinstance(layer.kernel, TritonLinear)
    expect(layer.kernel, list(parts.values()))


@pytest.mark.parametrize("weight", [integers(40, 8), integers(40, 4, 32)], ids=["int8", "int4"])
def test_a_tied_table_is_looked_up_in_the_head(weight: QuantizedTensor) -> None:
    embedding = VocabEmbedding(40, K, OPTIONS)
    head = LMHead(40, K, OPTIONS, tied_to=embedding)
    embedding.slots()["weight", None].fill(weight)
    ids = torch.tensor([0, 39, 7, 7])
    torch.testing.assert_close(embedding(ids), weight.dequantize()[ids], rtol=1e-6, atol=1e-8)
    expect(head.kernel, [weight])
    assert embedding.nbytes == 0
    assert head.nbytes == head.kernel.nbytes > 0


SHAPE = LinearShape(64, 128, 32, torch.float32, CPU)


class Timed:
    """A kernel that says how long it takes."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.nbytes = 0

    def __call__(self, x: Tensor) -> Tensor:
        return x


def measured(kernel: LinearKernel, x: Tensor) -> float:
    assert isinstance(kernel, Timed)
    assert x.shape[1] == SHAPE.in_features
    return kernel.seconds[len(x)]


def test_the_faster_kernel_is_taken_and_remembered(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = Timed({1: 4e-6, 64: 9e-6}), Timed({1: 5e-6, 64: 6e-6})
    timed = []

    def timer(kernel: LinearKernel, x: Tensor) -> float:
        timed.append(kernel)
        return measured(kernel, x)

    choices = LinearChoices(timer)
    candidates = {"penstock": lambda: ours, "torch": lambda: theirs}
    with caplog.at_level(logging.INFO):
        assert choices.choose(SHAPE, candidates) is theirs
    assert "penstock 4.0 / 9.0 us, torch 5.0 / 6.0 us for 1 / 64 tokens; torch is used" in caplog.text
    assert "64 x 128, groups of 32, float32" in caplog.text
    assert choices.choose(SHAPE, candidates) is theirs
    assert len(timed) == 4
    ours.seconds[64] = 7e-6
    assert choices.choose(dataclasses.replace(SHAPE, out_features=32), candidates) is ours


def test_a_kernel_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    ours = Timed({1: 4e-6, 64: 9e-6})

    def broken() -> LinearKernel:
        raise RuntimeError("no such operator")

    assert LinearChoices(measured).choose(SHAPE, {"penstock": lambda: ours, "torch": broken}) is ours
    assert "torch kernel is not used" in caplog.text
    with pytest.raises(RuntimeError, match="no such operator"):
        LinearChoices(measured).choose(SHAPE, {"penstock": broken, "torch": lambda: ours})


def test_nothing_is_timed_in_the_interpreter() -> None:
    weight = integers(16, 4, 32)
    assert torch_int4_supports(weight, CPU, torch.float32)
    assert isinstance(gpu_linear_kernel([weight], None, OPTIONS), TritonLinear)


def test_torch_int4_is_taken_when_it_is_faster() -> None:
    weight = integers(16, 4, 32)
    choices = LinearChoices(lambda kernel, x: 1.0 if isinstance(kernel, TorchInt4Linear) else 2.0)
    bias = torch.linspace(-1, 1, 16)
    kernel = gpu_linear_kernel([weight], bias, OPTIONS, choices)
    assert isinstance(kernel, TorchInt4Linear)
    expect(kernel, [weight], bias)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_torch_int4(group: int) -> None:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    zeros = torch.full((32, K // group), 0.03125)
    for weight in (integers(32, 4, group), integers(32, 4, group, offsets=zeros, input_order=order)):
        expect(TorchInt4Linear(weight, None, CPU, torch.float32), [weight])


def test_what_torch_int4_does_not_take() -> None:
    cuda = torch.device("cuda")
    assert torch_int4_supports(integers(32, 4, 32), cuda, torch.bfloat16)
    assert not torch_int4_supports(integers(32, 4, 32), cuda, torch.float16)
    assert not torch_int4_supports(integers(32, 4, 16), CPU, torch.float32)
    assert not torch_int4_supports(integers(30, 4, 32), CPU, torch.float32)
    assert not torch_int4_supports(integers(32, 8, 32), CPU, torch.float32)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_logits_of_a_model(quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_checkpoint(tmp_path, "qwen2", num_layers=1, vocab_size=270, tie_word_embeddings=True)
    config = EngineConfig(
        model=str(tmp_path), device="cpu", attention_backend="triton", dtype="float32", quantization=quantization
    )

    def logits() -> tuple[Tensor, int]:
        loaded = load_model(config, tmp_path, CPU, torch.float32, progress=False)
        loaded.model.prepare(16)
        return PagedModel(loaded).step({"a": [3, 50, 7, 120, 9]})["a"], loaded.weight_bytes

    packed, packed_bytes = logits()
    monkeypatch.setattr(gpu_linear, "can_pack", lambda weight: False)
    floats, float_bytes = logits()
    assert packed_bytes < float_bytes / 2
    # Scales of groups are rounded to eleven bits.
    torch.testing.assert_close(packed, floats, rtol=2e-3, atol=2e-3 * float(floats.abs().max()))
