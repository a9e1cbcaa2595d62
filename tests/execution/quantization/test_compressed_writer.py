"""The written folder: numbers as the format defines them, config.json, files, and that no half-written folder appears."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.quantized import Float8Tensor, QuantizedTensor
from penstock.execution.layers.weight import as_float
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.source import open_source
from penstock.execution.quantization import compressed_writer
from penstock.execution.quantization.compressed_writer import (
    CompressedWriter,
    SafetensorsReader,
    new_folder,
    pack_codes,
    quantization_config,
)
from penstock.execution.quantization.fp8 import round_float8
from penstock.execution.quantization.quantize import Scheme
from penstock.testing.checkpoints import write_tiny_checkpoint


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - no mapping
    return tensors


def quantized(bits: int, group_size: int, rows: int = 4, columns: int = 64) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, columns // group_size, generator=generator).bfloat16().float()
    return QuantizedTensor(codes=codes, bits=bits, group_size=group_size, scales=scales)


def test_eight_codes_in_a_word_the_first_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    assert [word & 0xFFFFFFFF for word in pack_codes(codes)[0].tolist()] == [0x87654321, 0xF000000F]


def test_numbers_as_the_format_defines_them(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    writer = CompressedWriter(tmp_path / "out")
    four, eight = quantized(4, 32), quantized(8, 64)
    writer.add("norm.weight", torch.ones(3))
    writer.add_quantized("a.weight", four, torch.bfloat16)
    writer.add_quantized("b.weight", eight, torch.bfloat16)
    writer.finish(source, Scheme.named("int4-rtn", 32))
    tensors = read_all(tmp_path / "out")
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == {
        "norm.weight": (torch.float32, [3]),
        "a.weight_packed": (torch.int32, [4, 8]),
        "a.weight_scale": (torch.bfloat16, [4, 2]),
        "a.weight_shape": (torch.int64, [2]),
        "b.weight": (torch.int8, [4, 64]),
        "b.weight_scale": (torch.bfloat16, [4, 1]),
    }
    assert tensors["a.weight_shape"].tolist() == [4, 64]
    shifts = 4 * torch.arange(8)
    values = ((tensors["a.weight_packed"].unsqueeze(-1) >> shifts) & 15).flatten(1) - 8
    weight = values * tensors["a.weight_scale"].float().repeat_interleave(32, dim=1)
    assert torch.equal(weight, four.dequantize())
    assert torch.equal(tensors["b.weight"].float() * tensors["b.weight_scale"].float(), eight.dequantize())


@pytest.mark.parametrize("scheme", ["int8", "int4-rtn", "fp8"])
def test_what_was_written_is_read_again_number_for_number(tmp_path: Path, scheme: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    written: QuantizedTensor | Float8Tensor = round_float8(weight, torch.bfloat16)
    if scheme != "fp8":
        written = quantized(8, 64, 48) if scheme == "int8" else quantized(4, 32, 48)
    writer = CompressedWriter(tmp_path / "out")
    writer.add_quantized("a.weight", written, torch.bfloat16)
    writer.finish(source, Scheme.named(scheme, 32))
    value = open_source(tmp_path / "out", ModelConfig.from_folder(tmp_path / "out").quantization).read("a.weight")
    assert type(value) is type(written)
    assert torch.equal(as_float(value), written.dequantize())
    for field in dataclasses.fields(written):
        expected, actual = getattr(written, field.name), getattr(value, field.name)
        if isinstance(expected, Tensor):
            assert torch.equal(expected.view(torch.uint8), actual.view(torch.uint8))
        else:
            assert expected == actual
    if scheme == "fp8":
        # Three bits behind the leading one: half a step is a sixteenth.
        assert ((written.dequantize() - weight).abs() <= weight.abs() / 15 + 1e-3).all()


def test_weights_that_the_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    tensor = quantized(4, 32)
    asymmetric = QuantizedTensor(tensor.codes, 4, 32, tensor.scales, offsets=tensor.scales)
    with pytest.raises(ValueError, match="only symmetric"):
        CompressedWriter(tmp_path).add_quantized("a.weight", asymmetric, torch.bfloat16)


def test_config_of_all_formats() -> None:
    eight = quantization_config(Scheme.named("int8", 32))
    assert (eight["quant_method"], eight["format"], eight["ignore"]) == (
        "compressed-tensors",
        "int-quantized",
        ["lm_head"],
    )
    group = eight["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", None)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    floats = quantization_config(Scheme.named("fp8", 32))
    assert floats["format"] == floats["config_groups"]["group_0"]["format"] == "float-quantized"
    group = floats["config_groups"]["group_0"]
    assert (group["weights"]["type"], group["weights"]["num_bits"], group["weights"]["strategy"]) == (
        "float",
        8,
        "channel",
    )
    assert (group["input_activations"]["type"], group["input_activations"]["strategy"]) == ("float", "token")
    four = quantization_config(Scheme.named("int4-gptq", 64))["config_groups"]["group_0"]
    assert four["format"] == "pack-quantized"
    assert four["input_activations"] is None
    assert (four["weights"]["num_bits"], four["weights"]["strategy"], four["weights"]["group_size"]) == (4, "group", 64)


def test_other_files_are_copied_and_the_config_is_extended(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", tokenizer=True, num_shards=2)
    (source / "penstock.json").write_text("{}")
    (source / ".hidden.json").write_text("{}")
    (source / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    writer = CompressedWriter(tmp_path / "out")
    writer.add("a", torch.ones(1))
    writer.finish(source, Scheme.named("int8", 32))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert after.pop("quantization_config") == quantization_config(Scheme.named("int8", 32))
    assert after == before


def test_large_checkpoints_are_written_in_numbered_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_writer, "_SHARD_BYTES", 1000)
    source = write_tiny_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    writer = CompressedWriter(tmp_path / "out")
    tensors = {f"t{index}": torch.full((100,), float(index)) for index in range(7)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish(source, Scheme.named("int8", 32))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2800}
    assert index["weight_map"]["t0"] == "model-00001-of-00003.safetensors"
    assert index["weight_map"]["t6"] == "model-00003-of-00003.safetensors"
    reader = SafetensorsReader(tmp_path / "out")
    assert set(reader.names()) == set(tensors)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_reader_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="no safetensors files"):
        SafetensorsReader(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelFormatError, match=r"model\.safetensors is no safetensors file"):
        SafetensorsReader(tmp_path)
    reader = SafetensorsReader(write_tiny_checkpoint(tmp_path / "model"))
    with pytest.raises(ModelFormatError, match="lacks the tensor 'absent'"):
        reader.read("absent")


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write_half() -> None:
        with new_folder(target, force=False) as draft:
            (draft / "config.json").write_text("{}")
            assert not target.exists()
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert list(tmp_path.iterdir()) == []
    with new_folder(target, force=False) as draft:
        (draft / "config.json").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (target / "config.json").read_text() == "new"


def test_only_model_folders_are_replaced_and_only_with_force(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(ConfigError, match="--force"), new_folder(target, force=False):
        pytest.fail("the block must not run")
    with pytest.raises(ConfigError, match="no model folder"), new_folder(target, force=True):
        pytest.fail("the block must not run")
    (target / "config.json").write_text("old")
    (target / "old.safetensors").write_text("old")
    with new_folder(target, force=True) as draft:
        (draft / "config.json").write_text("new")
    assert [file.name for file in target.iterdir()] == ["config.json"]
