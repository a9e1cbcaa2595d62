"""Models with mixtures of experts: quantised checkpoints and rounding at load, the same bits in all company, parts for ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.cli.quantize import check_scheme
from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.attention.backend import get_attention_backend
from penstock.execution.kernels import native
from penstock.execution.kernels.moe import NativeExperts
from penstock.execution.layers.moe import MixtureOfExperts
from penstock.execution.layers.options import LayerOptions
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.quantization.quantize import Scheme
from penstock.testing.checkpoints import ModelType, write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel
from penstock.testing.ranks import RankedModel
from tests.execution.quantization.quantized_checkpoints import awq_parts, gptq_parts, packed_parts, write_quantized

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"model_type": "qwen3_moe", "expert_size": 64, "num_experts": 6}
PROMPT = random.Random(1).choices(range(256), k=40)

needs_native = pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")


@pytest.fixture(autouse=True)
def one_thread_after() -> Iterator[None]:
    yield
    native.set_threads(1)


def load(folder: Path, **settings: Any) -> LoadedModel:
    config = EngineConfig(**({"weight_cache": False} | settings))
    return load_model(config, folder, CPU, torch.float32, progress=False)


def logits(loaded: LoadedModel) -> Tensor:
    return PagedModel(loaded).step({"a": PROMPT})["a"]


def divergence(expected: Tensor, actual: Tensor) -> float:
    """Mean KL(expected || actual) over positions, in nats."""
    p, q = expected.log_softmax(-1), actual.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


FORMATS: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Tensor]], dict[str, Any]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq_parts, {}),
    "gptq ordered": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True},
        gptq_parts,
        {"scattered": True, "symmetric": True},
    ),
    "packed": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
                    "input_activations": None,
                }
            },
        },
        packed_parts,
        {"symmetric": True},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_experts(tmp_path: Path, name: str) -> None:
    section, parts, options = FORMATS[name]
    write_quantized(tmp_path, section, parts, **options, **SIZES)
    plain, quantized = load(tmp_path / "plain"), load(tmp_path)
    assert quantized.quantization.startswith("int4 group 32")
    assert quantized.num_parameters == plain.num_parameters
    expected = logits(plain)
    torch.testing.assert_close(logits(load(tmp_path, quantization="none")), expected, rtol=0, atol=1e-4)
    # Native kernels round activations to 8 bits.
    assert divergence(expected, logits(quantized)) < 5e-3


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(("setting", "bound"), [("int8", 2e-3), ("int4", 0.2)])
def test_rounding_at_load(tmp_path: Path, model_type: ModelType, setting: str, bound: float) -> None:
    write_tiny_checkpoint(tmp_path, model_type, expert_size=64)
    exact, rounded = load(tmp_path), load(tmp_path, quantization=setting)
    assert rounded.quantization.startswith(setting)
    assert divergence(logits(exact), logits(rounded)) < bound
    routers = [next(m for m in one.model.modules() if isinstance(m, MixtureOfExperts)).gate for one in (exact, rounded)]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(routers[0](x), routers[1](x))


@needs_native
@pytest.mark.parametrize(("model_type", "setting"), [("mixtral", "int8"), ("qwen3_moe", "int4")])
def test_the_same_bits_in_every_batch_and_number_of_threads(
    tmp_path: Path, model_type: ModelType, setting: str
) -> None:
    write_tiny_checkpoint(tmp_path, model_type, expert_size=64, num_experts=6, dtype="bfloat16")
    loaded = load(tmp_path, quantization=setting)
    experts = [module for module in loaded.model.modules() if isinstance(module, MixtureOfExperts)]
    assert all(isinstance(module.kernel, NativeExperts) for module in experts)
    model = PagedModel(loaded)
    native.set_threads(1)
    prompts = {str(i): random.Random(i).choices(range(256), k=30 - 4 * i) for i in range(4)}
    alone = {
        name: torch.cat([model.step({name: [token]})[name] for token in prompt]) for name, prompt in prompts.items()
    }
    for threads in (1, 2):
        for name in prompts:
            model.finish(name)
        native.set_threads(threads)
        first = model.step({name: prompt[: 5 + threads] for name, prompt in prompts.items()})
        rest = model.step({name: prompt[5 + threads :] for name, prompt in prompts.items()})
        for name in prompts:
            assert torch.equal(torch.cat([first[name], rest[name]]), alone[name]), (threads, name)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_ranks_hold_whole_experts(tmp_path: Path, model_type: ModelType, backend: str) -> None:
    """Of four ranks the last one has none of five experts; its attention heads are as many as the others'."""
    write_tiny_checkpoint(tmp_path, model_type, num_experts=5, num_heads=8, head_dim=8)
    options = LayerOptions(torch.float32, CPU, get_attention_backend(backend, CPU), native=backend == "native")
    expected = RankedModel(tmp_path, options).step({"a": PROMPT})["a"]
    for ranks, stages in ((4, 1), (2, 2)):
        model = RankedModel(tmp_path, options, tensor_parallel_size=ranks, stages=stages)
        torch.testing.assert_close(model.step({"a": PROMPT})["a"], expected, rtol=0, atol=1e-4)
        held = [
            next(module.experts.present for module in part.modules() if isinstance(module, MixtureOfExperts))
            for part in model.models[0]
        ]
        assert held == {4: [(0, 1), (2, 3), (4,), ()], 2: [(0, 1, 2), (3, 4)]}[ranks]


@needs_native
def test_packed_experts_come_back_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("penstock.execution.quantization.weight_cache.MIN_BYTES", 0)
    folder = write_tiny_checkpoint(tmp_path / "model", "mixtral", dtype="bfloat16")
    first = load(folder, weight_cache=True, quantization="int8")
    assert first.pending_cache is not None
    assert first.pending_cache.write()
    again = load(folder, weight_cache=True, quantization="int8")
    assert again.pending_cache is None
    assert torch.equal(logits(first), logits(again))
    assert again.quantization == first.quantization


def test_random_weights(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, **SIZES)
    loaded = load(tmp_path, load_format="dummy", quantization="int8")
    assert bool(torch.isfinite(logits(loaded)).all())
    assert loaded.num_parameters == load(tmp_path).num_parameters


def test_experts_fused_into_one_tensor_are_refused_by_name(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    fused = torch.stack([tensors.pop(name.format(expert)) for expert in range(4)])
    save_file(tensors | {"model.layers.0.mlp.experts.down_proj": fused}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"unexpected tensor 'model\.layers\.0\.mlp\.experts\.down_proj'"):
        load(tmp_path)


def test_quantising_a_copy_says_what_to_do_instead(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match=r"mixtures of experts.*serve it with --quantization int8 or int4"):
        check_scheme(tmp_path, Scheme.named("int8", 32))
