"""Checkpoints of bitsandbytes, packed number by number as its source does."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.quantized import CodebookTensor, QuantizedTensor, StoredWeight
from penstock.execution.layers.weight import as_float, float_copy
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.models.source import QuantizedSource, SafetensorsSource, open_source
from penstock.execution.quantization.registry import CheckpointQuantization, checkpoint_format
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel
from tests.execution.quantization.quantized_checkpoints import write_replaced

CPU = torch.device("cpu")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)  # twelfths
CODEBOOKS = {"nf4": torch.tensor(NF4), "fp4": torch.tensor(FP4) / 12}


def section(kind: str = "nf4", *, bits: int = 4) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "bnb_4bit_quant_type": kind,
    }


def four_bits(
    weight: Tensor,
    seed: int,
    *,
    kind: str = "nf4",
    block: int = 64,
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
) -> tuple[dict[str, Tensor], Tensor]:
    """Random codes and absmaxes for a weight, as tensors and as what they stand for."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    blocks = -(-rows * columns // block)
    codes = torch.randint(0, 16, (rows * columns,), generator=generator)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
    parts = {"weight.quant_map": CODEBOOKS[kind].clone()}
    if nested:
        levels = torch.linspace(-1, 1, 256)
        chosen = torch.randint(0, 256, (blocks,), generator=generator)
        largest = torch.rand(-(-blocks // 256), generator=generator) * 0.1
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.15}
        parts |= {
            "weight.absmax": chosen.to(torch.uint8),
            "weight.nested_absmax": largest,
            "weight.nested_quant_map": levels,
        }
        absmax = levels[chosen] * largest[torch.arange(blocks) // 256] + 0.15
    else:
        absmax = parts["weight.absmax"] = torch.rand(blocks, generator=generator) * 0.2
    packed = (16 * codes[0::2] + codes[1::2]).to(torch.uint8)
    parts["weight"] = packed.view(storage).unsqueeze(1)
    text = json.dumps(state).encode()
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    numbers = CODEBOOKS[kind][codes] * absmax.repeat_interleave(block)[: rows * columns]
    return parts, numbers.double().view(rows, columns)


def eight_bits(weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, weight.shape, generator=generator).to(torch.int8)
    scales = torch.rand(len(weight), generator=generator) * 0.3
    parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes.double() * scales.double()[:, None] / 127


WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_heads": 2}
# How weights are stored, the shape of the model, and what the census says.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "nf4": (partial(four_bits), WIDE, "nf4 group 64"),
    "nf4-plain": (partial(four_bits, nested=False), WIDE, "nf4 group 64"),
    "nf4-bfloat16-storage": (partial(four_bits, storage=torch.bfloat16), WIDE, "nf4 group 64"),
    "nf4-across-rows": (partial(four_bits, block=256), {"hidden_size": 96}, "nf4 group 32"),
    "nf4-many-blocks": (partial(four_bits, block=32), WIDE, "nf4 group 32"),
    "fp4": (partial(four_bits, kind="fp4"), WIDE, "fp4 group 64"),
}


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> LoadedModel:
    return load_model(EngineConfig(**settings), folder, CPU, dtype, progress=False)


def logits(loaded: LoadedModel) -> Tensor:
    return PagedModel(loaded).step({"a": list(range(40))})["a"]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_bitsandbytes_would_make_of_them(tmp_path: Path, case: str) -> None:
    store, shape, text = CASES[case]
    expected = write_replaced(tmp_path, section(text[:3]), store, kept="o_proj", **shape)
    source = open_source(tmp_path, ModelConfig.from_folder(tmp_path).quantization)
    assert sorted(source.names()) == sorted(expected)
    for name, weight in expected.items():
        value = source.read(name)
        assert source.shape(name) == tuple(weight.shape)
        assert isinstance(value, CodebookTensor) is (name.endswith("_proj.weight") and "o_proj" not in name)
        assert torch.equal(as_float(value).double(), weight)
        if isinstance(value, CodebookTensor):
            assert f"{value.name} group {value.group_size}" == text
            assert torch.equal(float_copy(value, torch.bfloat16), weight.float().bfloat16())
    assert sum(source.nbytes(name) for name in source.names()) == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()
    )


@pytest.mark.parametrize("case", ["nf4", "nf4-across-rows", "fp4"])
def test_models_run_on_a_cpu_with_the_very_weights(tmp_path: Path, case: str) -> None:
    store, shape, text = CASES[case]
    write_replaced(tmp_path, section(text[:3]), store, **shape)
    loaded, expected = load(tmp_path, quantization="bitsandbytes"), logits(load(tmp_path / "plain"))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    widened = " as float32, head float32" if native_available() else ", head float32, computed as float32"
    assert loaded.quantization == f"{text}{widened}"
    assert loaded.pending_cache is None
    floats = load(tmp_path, quantization="none")
    assert floats.quantization == "none"
    torch.testing.assert_close(logits(floats), expected, rtol=0, atol=1e-5)


def test_eight_bits(tmp_path: Path) -> None:
    expected = write_replaced(tmp_path, section(bits=8), eight_bits)
    source = open_source(tmp_path, ModelConfig.from_folder(tmp_path).quantization)
    for name, weight in expected.items():
        value = source.read(name)
        assert isinstance(value, QuantizedTensor) is name.endswith("_proj.weight")
        torch.testing.assert_close(as_float(value).double(), weight, rtol=1e-6, atol=0)
    loaded = load(tmp_path, weight_cache=False)
    assert loaded.quantization.startswith("int8, head float32")
    actual, exact = logits(loaded).log_softmax(-1), logits(load(tmp_path / "plain")).log_softmax(-1)
    assert (exact.exp() * (exact - actual)).sum(-1).mean() < 3e-3


def test_the_setting_insists_on_the_format(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "plain")
    with pytest.raises(
        ConfigError, match=r"--quantization bitsandbytes needs a checkpoint in that format.*is not quantised"
    ):
        load(folder, quantization="bitsandbytes")
    write_replaced(tmp_path / "nf4", section(), four_bits, **WIDE)
    with pytest.raises(
        ConfigError, match=r"--quantization int8 rounds plain weights.*quantised already \(bitsandbytes\)"
    ):
        load(tmp_path / "nf4", quantization="int8")


STATE = "weight.quant_state.bitsandbytes__nf4"


def as_bytes(**changes: Any) -> Callable[[Tensor], Tensor]:
    """Changes fields of the JSON; None takes one away."""

    def change(stored: Tensor) -> Tensor:
        state = json.loads(bytes(stored.tolist())) | changes
        text = json.dumps({name: value for name, value in state.items() if value is not None})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (STATE, lambda x: x[:-1], r"weight\.quant_state\.bitsandbytes__nf4 is not valid JSON"),
        (STATE, lambda x: x.repeat(30), r"must be 1 to 4096 bytes of JSON"),
        (STATE, lambda _: torch.tensor(list(b"[" * 4000), dtype=torch.uint8), r"is not valid JSON"),
        (STATE, lambda _: torch.tensor(list(b"[1]"), dtype=torch.uint8), r"must be an object with no other fields"),
        (STATE, as_bytes(colour="red"), r"must be an object with no other fields"),
        (STATE, as_bytes(quant_type="fp4"), r"quant_type is 'fp4'"),
        (STATE, as_bytes(shape=[192]), r"shape must be two integers, not \[192\]"),
        (STATE, as_bytes(shape=[True, 128]), r"shape must be made of integers from 1"),
        (STATE, as_bytes(shape=[2**40, 128]), r"shape must be made of integers from 1"),
        (STATE, as_bytes(shape=[384, 128]), r"weight has shape \[12288, 1\], which does not hold 384 x 128 codes"),
        (STATE, as_bytes(blocksize=0), r"blocksize must be made of integers from 1"),
        (STATE, as_bytes(blocksize=None), r"blocksize must be made of integers from 1"),
        (STATE, as_bytes(blocksize=128), r"weight\.absmax has shape \[384\] where \[192\] is needed"),
        (STATE, as_bytes(nested_blocksize=None), r"nested_blocksize must be made of integers"),
        (STATE, as_bytes(nested_offset=1e999), r"nested_offset must be a finite number, not inf"),
        (STATE, as_bytes(nested_offset="1"), r"nested_offset must be a finite number, not '1'"),
        ("weight.absmax", None, r"up_proj\.weight\.absmax is missing"),
        (
            "weight.absmax",
            lambda x: x.half(),
            r"weight\.absmax has the type torch\.float16; with nested_absmax it must be uint8",
        ),
        (
            "weight.nested_absmax",
            None,
            r"weight\.absmax must hold finite floating-point numbers; it has the type torch\.uint8",
        ),
        ("weight.nested_absmax", lambda x: x * torch.nan, r"weight\.nested_absmax must hold finite"),
        ("weight.nested_quant_map", lambda x: x[:9], r"nested_quant_map has shape \[9\] where \[256\]"),
        ("weight.quant_map", lambda x: x[:9], r"quant_map has shape \[9\] where \[16\]"),
    ],
)
def test_states_that_cannot_be_trusted(
    tmp_path: Path, part: str, change: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    parts, _ = four_bits(torch.empty(192, 128), 0)
    stored = parts.pop(part)
    if change is not None:
        parts[part] = change(stored)
    with pytest.raises(ModelFormatError, match=message):
        read_one(tmp_path, parts)


def read_one(folder: Path, parts: dict[str, Tensor]) -> StoredWeight:
    """The weight that a checkpoint holds in these parts."""
    save_file({f"up_proj.{part}": tensor.contiguous() for part, tensor in parts.items()}, folder / "one.safetensors")
    form = checkpoint_format(CheckpointQuantization(method="bitsandbytes"))
    return QuantizedSource(SafetensorsSource([folder / "one.safetensors"], codes=True), form).read("up_proj.weight")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("SCB", lambda x: x[1:], r"SCB has shape \[95\] where \[96\]"),
        ("weight_format", lambda x: x + 2, r"weight_format is not 0 \(rows in order\); save the model again"),
        ("weight", lambda x: x.to(torch.int16), r"weight must be a matrix of int8"),
    ],
)
def test_eight_bits_that_cannot_be_read(
    tmp_path: Path, part: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    parts, _ = eight_bits(torch.empty(96, 64), 0)
    with pytest.raises(ModelFormatError, match=message):
        read_one(tmp_path, parts | {part: change(parts[part])})


def test_codes_without_their_state(tmp_path: Path) -> None:
    parts, _ = four_bits(torch.empty(192, 128), 0)
    del parts[STATE]
    with pytest.raises(ModelFormatError, match=r"up_proj.*needed is exactly one of.*0 are there"):
        read_one(tmp_path, parts)
