"""Checkpoints of every format, written from known codes, give exactly the weights that they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.quantized import QuantizedTensor
from penstock.execution.layers.weight import as_float
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.models.source import open_source
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel
from tests.execution.quantization.quantized_checkpoints import (
    awq_parts,
    gptq_parts,
    integer_parts,
    packed_parts,
    write_quantized,
)

CPU = torch.device("cpu")
WIDE = {"hidden_size": 128, "intermediate_size": 256}


def awq(group: int = 32) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}


def gptq(bits: int = 4, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": True} | changes


def compressed(bits: int = 4, form: str = "pack-quantized") -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


V2 = functools.partial(gptq_parts, shift=0)
CASES: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Tensor]], dict[str, Any]]] = {
    "awq-32": (awq(), awq_parts, {}),
    "awq-64": (awq(64), awq_parts, {"group_size": 64} | WIDE),
    "awq-128": (awq(128), awq_parts, {"group_size": 128} | WIDE),
    "awq-rows": (awq(-1), awq_parts, {"group_size": None}),
    "gptq": (gptq(), gptq_parts, {"symmetric": True}),
    "gptq-zeros": (gptq(sym=False), gptq_parts, {}),
    "gptq-v2": (gptq(checkpoint_format="gptq_v2"), V2, {}),
    "gptq-ordered": (gptq(desc_act=True), gptq_parts, {"scattered": True}),
    "gptq-ordered-symmetric": (gptq(desc_act=True), gptq_parts, {"scattered": True, "symmetric": True}),
    "gptq-rows": (gptq(group_size=-1), gptq_parts, {"group_size": None, "symmetric": True}),
    "gptq-8": (gptq(8), gptq_parts, {"bits": 8}),
    "gptq-8-ordered-v2": (gptq(8, checkpoint_format="gptq_v2"), V2, {"bits": 8, "scattered": True}),
    "packed": (compressed(), packed_parts, {"symmetric": True}),
    "packed-zeros": (compressed(), packed_parts, {}),
    "packed-ordered": (compressed(), packed_parts, {"scattered": True}),
    "packed-rows": (compressed(), packed_parts, {"group_size": None, "symmetric": True}),
    "packed-8": (compressed(8), packed_parts, {"bits": 8, "symmetric": True}),
    "packed-8-zeros-128": (compressed(8), packed_parts, {"bits": 8, "group_size": 128} | WIDE),
    "integers": (compressed(8, "int-quantized"), integer_parts, {"bits": 8, "group_size": None, "symmetric": True}),
    "integers-groups-zeros": (compressed(8, "int-quantized"), integer_parts, {"bits": 8}),
}


def load(folder: Path, quantization: str = "auto") -> LoadedModel:
    config = EngineConfig(quantization=quantization, weight_cache=False)
    return load_model(config, folder, CPU, torch.float32, progress=False)


def greedy(loaded: LoadedModel, count: int = 12) -> tuple[list[int], Tensor]:
    """Tokens after a prompt, and the prompt's logits."""
    model = PagedModel(loaded)
    prompt = model.step({"a": list(range(30, 60))})["a"]
    tokens = [int(prompt[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(model.step({"a": tokens[-1:]})["a"][-1].argmax()))
    return tokens, prompt


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_codes_say(tmp_path: Path, case: str) -> None:
    section, parts, options = CASES[case]
    expected = write_quantized(tmp_path, section, parts, **options)
    source = open_source(tmp_path, ModelConfig.from_folder(tmp_path).quantization)
    assert sorted(source.names()) == sorted(expected)
    for name, weight in expected.items():
        value = source.read(name)
        assert source.shape(name) == tuple(weight.shape)
        assert isinstance(value, QuantizedTensor) is name.endswith("_proj.weight")
        if isinstance(value, QuantizedTensor):
            assert (value.offsets is None) is options.get("symmetric", False)
            assert (value.input_order is not None) is options.get("scattered", False)
        assert torch.equal(as_float(value).double(), weight)
    assert sum(source.nbytes(name) for name in source.names()) == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()
    )


@pytest.mark.parametrize("case", CASES)
def test_models_run_and_none_turns_them_into_floats(tmp_path: Path, case: str) -> None:
    section, parts, options = CASES[case]
    write_quantized(tmp_path, section, parts, **options)
    plain, floats, quantized = load(tmp_path / "plain"), load(tmp_path, "none"), load(tmp_path)
    assert floats.quantization == plain.quantization == "none"
    tokens, expected = greedy(plain)
    assert greedy(floats)[0] == tokens
    torch.testing.assert_close(greedy(floats)[1], expected, rtol=0, atol=1e-4)
    assert f"int{options.get('bits', 4)}" in quantized.quantization
    assert "head float32" in quantized.quantization
    assert quantized.model_hash != floats.model_hash
    assert quantized.num_parameters == plain.num_parameters
    # Native kernels round activations to 8 bits.
    actual = greedy(quantized)[1]
    divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - actual.log_softmax(-1))).sum(-1)
    assert divergence.mean() < 3e-3
    if native_available():
        assert quantized.weight_bytes < plain.weight_bytes


def test_a_scale_for_the_whole_tensor_and_zeros_of_other_types(tmp_path: Path) -> None:
    expected = write_quantized(
        tmp_path, compressed(8, "int-quantized"), integer_parts, bits=8, group_size=None, symmetric=True
    )
    tensors = load_file(tmp_path / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    tensors[f"{module}.weight_scale"] = torch.tensor(0.25)
    tensors[f"{module}.weight_zero_point"] = torch.tensor([0], dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_source(tmp_path, ModelConfig.from_folder(tmp_path).quantization)
    value = source.read(f"{module}.weight")
    assert isinstance(value, QuantizedTensor)
    assert torch.equal(value.dequantize(), 0.25 * tensors[f"{module}.weight"].float())
    assert value.shape == tuple(expected[f"{module}.weight"].shape)


@pytest.mark.parametrize(
    ("case", "part", "change", "message"),
    [
        ("awq-32", "qzeros", None, r"qweight'.*self_attn\.q_proj\.qzeros is missing"),
        ("awq-32", "scales", lambda x: x[:, :-8], r"qweight has shape"),
        ("awq-32", "qweight", lambda x: x.half(), r"unexpected tensor|belongs? to no|has none"),
        ("gptq", "scales", lambda x: x[:1], r"qzeros has shape"),
        ("gptq", "g_idx", lambda x: x[1:], r"g_idx has shape \[63\] where \[64\]"),
        ("gptq", "g_idx", torch.zeros_like, r"must give each group 32 input features"),
        ("gptq", "g_idx", lambda x: x + 1, r"numbers from 0 to 1"),
        ("gptq", "qzeros", lambda x: torch.cat((x, x), 1)[:, :6], r"weights of 3 bits are not supported"),
        ("packed", "weight_scale", lambda x: x[:-1], r"weight_scale has shape \[63, 2\]"),
        ("packed", "weight_scale", lambda x: x.repeat(1, 4), r"groups of 8 input features are not supported"),
        ("packed", "weight_shape", lambda x: x * 3, r"cannot hold 192 input features"),
        ("packed-zeros", "weight_zero_point", lambda x: x.float(), r"weight_zero_point has type torch\.float32"),
        ("integers", "weight_scale", lambda x: x.int(), r"scales have the type torch\.int32"),
    ],
)
def test_parts_that_contradict_each_other(
    tmp_path: Path, case: str, part: str, change: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    section, parts, options = CASES[case]
    write_quantized(tmp_path, section, parts, **options)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=message):
        load(tmp_path)


def test_integers_that_belong_to_nothing(tmp_path: Path) -> None:
    section, parts, options = CASES["gptq"]
    write_quantized(tmp_path, section, parts, **options)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.counter": torch.tensor([3])}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"'model\.counter' holds integers that belong to no quantised weight"):
        load(tmp_path)


def test_settings_that_do_not_fit_the_checkpoint(tmp_path: Path) -> None:
    section, parts, options = CASES["gptq"]
    write_quantized(tmp_path / "gptq", section, parts, **options)
    plain = write_tiny_checkpoint(tmp_path / "plain")
    assert load(tmp_path / "gptq", "gptq").quantization.startswith("int4 group 32")
    with pytest.raises(ConfigError, match=r"--quantization awq needs a checkpoint in that format.*has the format gptq"):
        load(tmp_path / "gptq", "awq")
    with pytest.raises(ConfigError, match=r"--quantization gptq needs a checkpoint in that format.*is not quantised"):
        load(plain, "gptq")
    with pytest.raises(ConfigError, match=r"--quantization int8 rounds plain weights.*quantised already \(gptq\)"):
        load(tmp_path / "gptq", "int8")
