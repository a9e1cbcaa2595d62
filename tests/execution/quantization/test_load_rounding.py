"""--quantization int8 and int4 on plain checkpoints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.quantized import QuantizedTensor
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.loader import LoadOptions, Rounding, load_weights
from penstock.execution.models.registry import LoadedModel, build_model, load_model
from penstock.execution.models.source import SafetensorsSource
from penstock.execution.parallel.sharding import WHOLE, Shard
from penstock.execution.quantization.rounding import RoundingScheme, round_weight
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel

CPU = torch.device("cpu")


def load(folder: Path, quantization: str, dtype: torch.dtype = torch.float32, group_size: int = 32) -> LoadedModel:
    config = EngineConfig(quantization=quantization, quantization_group_size=group_size, weight_cache=False)
    return load_model(config, folder, CPU, dtype, progress=False)


def logits(loaded: LoadedModel) -> torch.Tensor:
    return PagedModel(loaded).step({"a": list(range(40))})["a"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("setting", "text"), [("int8", "int8"), ("int4", "int4 group 32, head int8"), ("none", "none"), ("auto", "none")]
)
def test_what_is_rounded(tmp_path: Path, setting: str, text: str, tied: bool) -> None:
    """The model computes what a checkpoint of the rounded numbers gives."""
    write_tiny_checkpoint(tmp_path / "plain", "qwen3", head_dim=32, tie_word_embeddings=tied, dtype="bfloat16")
    loaded = load(tmp_path / "plain", setting)
    described = loaded.quantization
    assert described.removesuffix("" if native_available() else ", computed as float32") == text

    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    for name, tensor in tensors.items():
        head = name == ("model.embed_tokens.weight" if tied else "lm_head.weight")
        tensors[name] = tensor.float()
        if setting in ("int8", "int4") and (head or "_proj." in name):
            scheme = RoundingScheme(4 if setting == "int4" and not head else 8)
            tensors[name] = round_weight(tensor, scheme).dequantize()
    write_tiny_checkpoint(tmp_path / "rounded", "qwen3", head_dim=32, tie_word_embeddings=tied)
    save_file(tensors, tmp_path / "rounded" / "model.safetensors")
    expected, actual = logits(load(tmp_path / "rounded", "auto")), logits(loaded)
    divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - actual.log_softmax(-1))).sum(-1)
    assert divergence.mean() < (3e-3 if setting in ("int8", "int4") and native_available() else 1e-6)


def test_hash_and_size_follow_the_setting(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, hidden_size=128, intermediate_size=256)
    settings = (("auto", 32), ("int8", 32), ("int4", 32), ("int4", 128))
    loaded = [load(folder, setting, group_size=size) for setting, size in settings]
    assert len({model.model_hash for model in loaded}) == 4
    assert len({model.num_parameters for model in loaded}) == 1
    if native_available():
        sizes = [model.weight_bytes for model in loaded]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 4


def test_layers_that_no_group_divides_are_int8(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, intermediate_size=112)
    assert load(folder, "int4").quantization.startswith("int4 group 32 + int8, head int8")


@pytest.mark.skipif(not native_available(), reason="no native kernels in this installation")
def test_bfloat16_arithmetic(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    full, half = load(folder, "auto"), load(folder, "auto", torch.bfloat16)
    assert half.activation_dtype == torch.float32
    assert half.weight_bytes < 0.6 * full.weight_bytes
    torch.testing.assert_close(logits(half), logits(full), rtol=0, atol=0.1)


@pytest.mark.parametrize("setting", ["int8", "int4"])
def test_infinity_is_an_error_that_names_the_tensor(tmp_path: Path, setting: str) -> None:
    write_tiny_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight': it holds infinity or NaN"):
        load(tmp_path, setting)


def test_what_a_source_gives_quantised_is_not_rounded_again(tmp_path: Path) -> None:
    """A format that says nothing in config.json."""

    class Quantized:
        def __init__(self, source: SafetensorsSource) -> None:
            self.names, self.shape, self.nbytes, self.where = source.names, source.shape, source.nbytes, source.where
            self.source = source

        def read(self, name: str, shard: Shard = WHOLE) -> torch.Tensor | QuantizedTensor:
            value = self.source.read(name, shard)
            return round_weight(value, RoundingScheme(8)) if value.ndim == 2 else value

    folder = write_tiny_checkpoint(tmp_path)
    model = load(folder, "auto").model
    assert model.lm_head is not None
    options = model.lm_head.options
    source = Quantized(SafetensorsSource([folder / "model.safetensors"]))
    rounding = Rounding({"linear": RoundingScheme(8), "head": RoundingScheme(8)}, "--quantization int8")
    with pytest.raises(ConfigError, match=r"--quantization int8 rounds plain weights.*drop --quantization int8"):
        load_weights(build_model(ModelConfig.from_folder(folder), options), source, LoadOptions(rounding=rounding))
    census = load_weights(build_model(ModelConfig.from_folder(folder), options), source, LoadOptions())
    assert census.text() == "int8, embeddings int8"
    census = load_weights(build_model(ModelConfig.from_folder(folder), options), source, LoadOptions(dequantize=True))
    assert census.text() == "none"


PEAK = """
import sys, torch
from pathlib import Path
from penstock.core.config import EngineConfig
from penstock.execution.models.registry import load_model
def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
torch.set_num_threads(1)
config = EngineConfig(load_format=sys.argv[2], quantization=sys.argv[3], weight_cache=False)
load_model(config, Path(sys.argv[4]), torch.device("cpu"), torch.float32, False)
before = memory("VmRSS")
loaded = load_model(config, Path(sys.argv[1]), torch.device("cpu"), torch.float32, False)
print(memory("VmHWM") - before, loaded.weight_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not native_available() or sys.platform != "linux", reason="measured with native kernels on Linux")
@pytest.mark.parametrize(
    ("setting", "load_format", "tied"),
    [("int8", "dummy", False), ("int4", "auto", False), ("int4", "auto", True), ("auto", "auto", True)],
)
def test_peak_memory(tmp_path: Path, setting: str, load_format: str, tied: bool) -> None:
    """At most 1.2 times the finished weights: 24 layers and a head of a tenth of the model."""
    folder = write_tiny_checkpoint(
        tmp_path / "model", num_layers=24, hidden_size=512, intermediate_size=2048, num_heads=8, num_kv_heads=4,
        vocab_size=16_000, tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip
    warm = write_tiny_checkpoint(tmp_path / "warm")
    command = [sys.executable, "-c", PEAK, str(folder), load_format, setting, str(warm)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    numbers = re.findall(r"\d+", result.stdout)
    peak, weights = int(numbers[0]), int(numbers[1])
    assert weights > 50 * 2**20
    assert peak <= 1.2 * weights
