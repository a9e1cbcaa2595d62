"""Every form of weight through the path that a GPU takes, from the checkpoint to logits; in Triton's interpreter where there is none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.quantization.compressed_writer import CompressedWriter, SafetensorsReader
from penstock.execution.quantization.fp8 import round_float8
from penstock.execution.quantization.quantize import Scheme
from penstock.execution.quantization.rounding import RoundingScheme, round_weight
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel
from tests.execution.quantization import test_bitsandbytes, test_fp8
from tests.execution.quantization.quantized_checkpoints import awq_parts, gptq_parts, write_quantized, write_replaced
from tests.execution.quantization.test_formats import awq, gptq

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "num_kv_heads": 1,
}
TOKENS = [40, 2, 117]


def load(folder: Path, **settings: Any) -> LoadedModel:
    config = EngineConfig(attention_backend="triton", weight_cache=False, **settings)
    return load_model(config, folder, DEVICE, torch.float32, progress=False)


def logits(loaded: LoadedModel) -> Tensor:
    loaded.model.prepare(64)
    return PagedModel(loaded).step({"a": TOKENS})["a"].cpu()


def exact_logits(folder: Path) -> Tensor:
    """Of the weights as floats, by other kernels."""
    config = EngineConfig(quantization="none", weight_cache=False)
    return PagedModel(load_model(config, folder, torch.device("cpu"), torch.float32, progress=False)).step(
        {"a": TOKENS}
    )["a"]


FORMATS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "awq": (lambda folder: write_quantized(folder, awq(), awq_parts, **SHAPE), "int4 group 32"),
    "gptq-ordered": (
        lambda folder: write_quantized(folder, gptq(desc_act=True), gptq_parts, scattered=True, symmetric=True, **SHAPE),
        "int4 group 32",
    ),
    "fp8-blocks": (
        lambda folder: write_replaced(folder, test_fp8.fp8(), partial(test_fp8.quantize, **test_fp8.BLOCKS), **SHAPE | {"num_kv_heads": 2}),
        "fp8 block 32x64",
    ),
    "fp8-channels": (
        lambda folder: write_replaced(
            folder, test_fp8.compressed("channel"), partial(test_fp8.quantize, **test_fp8.CASES["compressed-channel"][1]), **SHAPE
        ),
        "fp8",
    ),
    "nf4": (
        lambda folder: write_replaced(folder, test_bitsandbytes.section(), test_bitsandbytes.four_bits, **SHAPE),
        "nf4 group 64",
    ),
    "bitsandbytes-int8": (
        lambda folder: write_replaced(folder, test_bitsandbytes.section(bits=8), test_bitsandbytes.eight_bits, **SHAPE),
        "int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints(tmp_path: Path, name: str) -> None:
    write, text = FORMATS[name]
    write(tmp_path)
    loaded = load(tmp_path)
    assert loaded.quantization == f"{text}, head float32"
    plain = sum(tensor.nbytes for tensor in load_file(tmp_path / "plain" / "model.safetensors").values())
    assert loaded.weight_bytes < plain
    divergence_is_small(exact_logits(tmp_path), logits(loaded))


@pytest.mark.parametrize("scheme", ["int8", "int4-rtn", "fp8"])
def test_what_penstock_quantize_writes(tmp_path: Path, scheme: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", **SHAPE)
    (tmp_path / "out").mkdir()
    writer, reader = CompressedWriter(tmp_path / "out"), SafetensorsReader(source)
    for name in reader.names():
        weight = reader.read(name)
        if not name.endswith("_proj.weight"):
            writer.add(name, weight)
        elif scheme == "fp8":
            writer.add_quantized(name, round_float8(weight, torch.float32), torch.float32)
        else:
            writer.add_quantized(
                name, round_weight(weight, RoundingScheme(8 if scheme == "int8" else 4)), torch.float32
            )
    writer.finish(source, Scheme.named(scheme, 32))
    loaded = load(tmp_path / "out")
    assert loaded.quantization == {"int8": "int8", "int4-rtn": "int4 group 32", "fp8": "fp8"}[scheme] + ", head float32"
    divergence_is_small(exact_logits(tmp_path / "out"), logits(loaded))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("setting", "text"), [("fp8", "fp8, head float32"), ("int8", "int8"), ("int4", "int4 group 32, head int8")]
)
def test_rounding_at_load(tmp_path: Path, setting: str, text: str, tied: bool) -> None:
    """The same numbers as a checkpoint of the rounded weights; a tied head in 8 bits is the only table."""
    folder = write_tiny_checkpoint(tmp_path / "plain", tie_word_embeddings=tied, **SHAPE)
    loaded = load(folder, quantization=setting)
    assert loaded.quantization == text
    tensors = load_file(folder / "model.safetensors")
    rounded = dict(tensors)
    for name, tensor in tensors.items():
        head = name == ("model.embed_tokens.weight" if tied else "lm_head.weight")
        if setting == "fp8" and "_proj." in name:
            rounded[name] = round_float8(tensor, torch.float32).dequantize()
        elif setting != "fp8" and (head or "_proj." in name):
            rounded[name] = round_weight(
                tensor, RoundingScheme(4 if setting == "int4" and not head else 8)
            ).dequantize()
    write_tiny_checkpoint(tmp_path / "rounded", tie_word_embeddings=tied, **SHAPE)
    save_file(rounded, tmp_path / "rounded" / "model.safetensors")
    divergence_is_small(exact_logits(tmp_path / "rounded"), logits(loaded))
    if tied and setting == "int8":
        # Rows of 64 numbers are padded to 128.
        assert loaded.weight_bytes < 0.5 * sum(tensor.nbytes for tensor in tensors.values())


def divergence_is_small(expected: Tensor, actual: Tensor) -> None:
    """Scales of groups are kept in float16, which is all that may differ."""
    divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - actual.log_softmax(-1))).sum(-1)
    assert divergence.max() < 1e-4
