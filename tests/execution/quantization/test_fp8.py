"""Checkpoints in 8-bit floats, in all the ways in which the hub has them, and --quantization fp8."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.quantized import Float8Tensor
from penstock.execution.layers.weight import as_float, float_copy
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.models.source import open_source
from penstock.execution.quantization.fp8 import Float8Rounding
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel
from tests.execution.quantization.quantized_checkpoints import write_replaced
from tests.execution.quantization.test_load_rounding import PEAK

CPU = torch.device("cpu")
# The sizes that blocks of 32 x 64 do not divide are 48 (key and value projections) and 112 (the MLP's width).
SHAPE: dict[str, Any] = {
    "hidden_size": 96, "num_heads": 6, "num_kv_heads": 3, "head_dim": 16, "intermediate_size": 112, "dtype": "bfloat16",
}  # fmt: skip
BLOCK = (32, 64)

Parts = tuple[dict[str, Tensor], Tensor]


def fp8(**changes: Any) -> dict[str, Any]:
    section = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    return section | {"modules_to_not_convert": ["lm_head"]} | changes


def compressed(strategy: str, *, dynamic: bool = True, block: list[int] | None = None) -> dict[str, Any]:
    floats = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = floats | {"strategy": strategy, "dynamic": False, "block_structure": block}
    inputs = floats | {"strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": "float-quantized"}
    section = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    return section | {"ignore": ["lm_head"], "quantization_status": "compressed"}


def quantize(weight: Tensor, _seed: int, *, block: tuple[int, int], names: dict[str, Any]) -> Parts:
    """names: 'scale' and 'input' are the names of the parts, 'dtype' and 'shape' those of the scales. A side of 0 is the whole weight."""
    rows, columns = weight.shape
    height, width = block[0] or rows, block[1] or columns
    padded = F.pad(weight.float(), (0, -columns % width, 0, -rows % height))
    tiles = padded.view(-1, height, padded.shape[1] // width, width)
    scales = tiles.abs().amax(dim=(1, 3)).div(448)
    if names.get("dtype") == torch.float8_e8m0fnu:
        scales = scales.log2().ceil().exp2()
    scales = scales.to(names.get("dtype", torch.float32))
    spread = scales.float().repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    codes = (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    parts = {"weight": codes, names["scale"]: scales.reshape(names.get("shape", scales.shape))}
    if "input" in names:
        parts[names["input"]] = torch.tensor(0.03125)
    return parts, codes.double() * spread.double()


BLOCKS: dict[str, Any] = {"block": BLOCK, "names": {"scale": "weight_scale_inv"}}
TENSOR: dict[str, Any] = {"block": (0, 0), "names": {"scale": "weight_scale", "input": "input_scale", "shape": ()}}
# Section, how weights are stored, the block and the text of the census.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "blocks": (fp8(), BLOCKS, "fp8 block 32x64"),
    "blocks-bfloat16": (fp8(), {"block": BLOCK, "names": {"scale": "weight_scale_inv", "dtype": torch.bfloat16}}, "fp8 block 32x64"),
    "blocks-powers": (
        fp8(scale_fmt="ue8m0"), {"block": BLOCK, "names": {"scale": "weight_scale_inv", "dtype": torch.float8_e8m0fnu}}, "fp8 block 32x64",
    ),
    "tensor-static": (fp8(activation_scheme="static", weight_block_size=None), TENSOR, "fp8"),
    "tensor-transformers": (
        fp8(activation_scheme="static", weight_block_size=None),
        {"block": (0, 0), "names": {"scale": "weight_scale_inv", "input": "activation_scale", "shape": ()}}, "fp8",
    ),
    "compressed-tensor": (compressed("tensor", dynamic=False), TENSOR | {"names": TENSOR["names"] | {"shape": (1,)}}, "fp8"),
    "compressed-channel": (compressed("channel"), {"block": (1, 0), "names": {"scale": "weight_scale", "dtype": torch.bfloat16}}, "fp8"),
    "compressed-group": (compressed("group"), {"block": (1, 16), "names": {"scale": "weight_scale"}}, "fp8 group 16"),
    "compressed-block": (compressed("block", block=[32, 64]), {"block": BLOCK, "names": {"scale": "weight_scale"}}, "fp8 block 32x64"),
}  # fmt: skip


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> LoadedModel:
    return load_model(EngineConfig(**settings), folder, CPU, dtype, progress=False)


def logits(loaded: LoadedModel) -> Tensor:
    return PagedModel(loaded).step({"a": list(range(40))})["a"]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_codes_and_scales_say(tmp_path: Path, case: str) -> None:
    section, stored, _ = CASES[case]
    expected = write_replaced(tmp_path, section, partial(quantize, **stored), kept="o_proj", **SHAPE)
    source = open_source(tmp_path, ModelConfig.from_folder(tmp_path).quantization)
    assert sorted(source.names()) == sorted(expected)
    for name, weight in expected.items():
        value = source.read(name)
        assert source.shape(name) == tuple(weight.shape)
        assert isinstance(value, Float8Tensor) is (name.endswith("_proj.weight") and "o_proj" not in name)
        torch.testing.assert_close(as_float(value).double(), weight, rtol=1e-6, atol=0)
        if isinstance(value, Float8Tensor):
            assert value.activation_scale == (0.03125 if "input" in stored["names"] else None)
            assert torch.equal(float_copy(value, torch.bfloat16), value.dequantize().bfloat16())
    assert sum(source.nbytes(name) for name in source.names()) == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()
    )


@pytest.mark.parametrize("case", CASES)
def test_models_run_on_a_cpu_with_the_very_weights(tmp_path: Path, case: str) -> None:
    section, stored, text = CASES[case]
    write_replaced(tmp_path, section, partial(quantize, **stored), **SHAPE)
    loaded, expected = load(tmp_path), logits(load(tmp_path / "plain"))
    # Native layers keep them in the type that the checkpoint says it is computed in, with what that rounds.
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0.05 if native_available() else 1e-5)
    widened = " as bfloat16, head bfloat16" if native_available() else ", head bfloat16, computed as float32"
    assert loaded.quantization == f"{text}{widened}"
    assert loaded.pending_cache is None
    floats = load(tmp_path, quantization="none")
    assert floats.quantization == "none"
    torch.testing.assert_close(logits(floats), expected, rtol=0, atol=1e-5)
    assert load(tmp_path, quantization="fp8").quantization == loaded.quantization
    if native_available():
        assert loaded.weight_bytes < 0.6 * floats.weight_bytes
        write_replaced(tmp_path, section, partial(quantize, **stored), **SHAPE | {"dtype": "float32"})
        wide = load(tmp_path)
        assert wide.quantization == f"{text} as float32, head float32"
        torch.testing.assert_close(logits(wide), logits(load(tmp_path / "plain")), rtol=0, atol=1e-5)
        assert load(tmp_path, torch.bfloat16).quantization == f"{text} as bfloat16, head float32"


@pytest.mark.parametrize("case", ["blocks", "tensor-transformers"])
def test_transformers_reads_the_same_weights(tmp_path: Path, case: str) -> None:
    """With sizes that blocks divide: its own dequantisation knows no others."""
    pytest.importorskip("accelerate")
    section, stored, _ = CASES[case]
    shape: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 192}
    write_replaced(tmp_path, section | {"dequantize": True}, partial(quantize, **stored), **shape)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(40)
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "part", "change", "message"),
    [
        ("blocks", "weight_scale_inv", None, r"mlp\.up_proj\.weight_scale is missing"),
        ("blocks", "weight_scale_inv", lambda x: x[1:], r"scales have shape \[3, 2\] for a weight of shape \[112, 96\].*block of 32 x 64"),
        ("blocks", "weight_scale_inv", lambda x: x * torch.inf, r"weight_scale_inv holds infinity or NaN"),
        ("blocks", "weight_scale_inv", lambda x: x.int(), r"weight_scale_inv has the type torch\.int32"),
        ("blocks", "weight", lambda x: x.view(torch.int8), r"codes of type torch\.int8 are not supported; supported: float8_e4m3fn"),
        ("blocks", "weight", lambda x: x.flatten(), r"must be a matrix"),
        ("tensor-static", "input_scale", lambda x: -x, r"input_scale must be one number above 0"),
        ("tensor-static", "input_scale", lambda x: x.repeat(2), r"input_scale must be one number above 0"),
        ("compressed-group", "weight_scale", lambda x: x.repeat(1, 2), r"blocks of 1 x 8 are not supported"),
    ],
)  # fmt: skip
def test_parts_that_contradict_each_other(
    tmp_path: Path, case: str, part: str, change: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    section, stored, _ = CASES[case]
    write_replaced(tmp_path, section, partial(quantize, **stored), **SHAPE)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{part}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=message):
        load(tmp_path)


def test_codes_that_belong_to_nothing_and_codes_without_a_format(tmp_path: Path) -> None:
    write_replaced(tmp_path, fp8(), partial(quantize, **BLOCKS), **SHAPE)
    tensors = load_file(tmp_path / "model.safetensors")
    stray = {"model.stray": torch.zeros(4).to(torch.float8_e4m3fn)}
    save_file(tensors | stray, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"'model\.stray' holds 8-bit floats that belong to no quantised weight"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFormatError, match=r"has type 'F8_E4M3', which is not supported"):
        load(tmp_path)


def test_rounding_at_load_needs_an_accelerator(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    with pytest.raises(
        ConfigError, match=r"--quantization fp8 rounds weights to 8-bit floats, which needs a GPU; use int8"
    ):
        load(folder, quantization="fp8")


def test_rounding_is_to_the_nearest_with_a_scale_for_each_output_feature() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 64, generator=generator) * torch.rand(40, 1, generator=generator).exp()
    weight[3] = 0
    rounded = Float8Rounding(CPU).begin(40, 64)
    rounded.put(0, weight[:7])
    rounded.put(7, weight[7:].double())
    value = rounded.tensor()
    assert value.block == (1, 64)
    assert torch.equal(value.codes.float().abs().amax(1)[weight.any(1)], torch.full((39,), 448.0))
    assert torch.equal(value.dequantize()[3], torch.zeros(64))
    # Three bits behind the leading one; below 2 ** -6 the steps are 2 ** -9.
    steps = (value.codes.float().abs().clamp(min=2**-6).log2().floor() - 3).exp2() * value.scales
    assert bool(((value.dequantize() - weight).abs() <= 0.5001 * steps).all())
    for bad in (torch.inf, torch.nan):
        weight[5, 6] = bad
        with pytest.raises(ValueError, match="infinity or NaN"):
            Float8Rounding(CPU).begin(40, 64).put(0, weight)


@pytest.mark.slow
@pytest.mark.skipif(not native_available() or sys.platform != "linux", reason="measured with native kernels on Linux")
def test_peak_memory_when_blocks_are_widened(tmp_path: Path) -> None:
    """At most 1.2 times the finished weights, of which a layer is a twentieth and the head a tenth."""
    shape: dict[str, Any] = {
        "num_layers": 20,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_heads": 8,
        "num_kv_heads": 4,
    }
    store = partial(quantize, block=(128, 128), names={"scale": "weight_scale_inv"})
    section = fp8(weight_block_size=[128, 128])
    write_replaced(tmp_path / "model", section, store, **shape | {"vocab_size": 12_000, "dtype": "bfloat16"})
    warm = write_tiny_checkpoint(tmp_path / "warm")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model"), "auto", "auto", str(warm)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    peak, weights = (int(number) for number in result.stdout.split())
    assert weights > 50 * 2**20
    assert peak <= 1.2 * weights
