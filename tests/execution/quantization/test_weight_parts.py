"""A part of a weight, in every format: the numbers that it has in the whole, and hardly more read than the part."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.execution.layers.weight import as_float
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.source import QuantizedSource, SafetensorsSource, WeightSource, open_source
from penstock.execution.parallel.sharding import WHOLE, Shard
from penstock.execution.quantization import gguf as gguf_module
from penstock.execution.quantization.registry import CheckpointQuantization, checkpoint_format
from penstock.testing.checkpoints import write_tiny_checkpoint
from tests.execution.quantization import test_bitsandbytes, test_formats, test_fp8
from tests.execution.quantization.quantized_checkpoints import write_quantized, write_replaced
from tests.gguf_files import QuantizationType, write_gguf

LAYER = "model.layers.0"
# Query heads, key and value heads, the width of the MLP and the hidden size, that all formats can hold; blocks of 16 x 32 fit into none.
SHAPE: dict[str, Any] = {
    "hidden_size": 128, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "intermediate_size": 192, "num_layers": 1,
}  # fmt: skip
UNEVEN: dict[str, Any] = SHAPE | {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 3, "intermediate_size": 160}

Writer = Callable[[Path, dict[str, Any]], object]


def integers(case: str) -> Writer:
    section, parts, options = test_formats.CASES[case]
    own = {name: value for name, value in options.items() if name not in test_formats.WIDE}
    return lambda folder, shape: write_quantized(folder, section, parts, **(own | shape))


def floats(case: str) -> Writer:
    section, stored, _ = test_fp8.CASES[case]
    return lambda folder, shape: write_replaced(folder, section, partial(test_fp8.quantize, **stored), **shape)


def codebook(case: str) -> Writer:
    store, _, text = test_bitsandbytes.CASES[case]
    return lambda folder, shape: write_replaced(folder, test_bitsandbytes.section(text[:3]), store, **shape)


def eight_bits(folder: Path, shape: dict[str, Any]) -> None:
    write_replaced(folder, test_bitsandbytes.section(bits=8), test_bitsandbytes.eight_bits, **shape)


def gguf_blocks(kind: QuantizationType) -> Writer:
    def write(folder: Path, shape: dict[str, Any]) -> None:
        checkpoint = write_tiny_checkpoint(folder, tokenizer=True, attention_bias=True, **shape)
        write_gguf(checkpoint, folder / "model.gguf", quantization=kind)

    return write


def plain(folder: Path, shape: dict[str, Any]) -> None:
    write_tiny_checkpoint(folder, "qwen2", dtype="bfloat16", **shape)


# How to write a checkpoint.
FORMATS: dict[str, Writer] = {
    "plain": plain,
    **{f"integers-{case}": integers(case) for case in test_formats.CASES if "128" not in case},
    **{f"floats-{case}": floats(case) for case in test_fp8.CASES},
    **{f"codebook-{case}": codebook(case) for case in test_bitsandbytes.CASES},
    "codebook-int8": eight_bits,
    **{f"gguf-{kind.name}": gguf_blocks(kind) for kind in (QuantizationType.F16, QuantizationType.Q8_0, QuantizationType.Q4_1)},
}  # fmt: skip


def source_of(folder: Path) -> WeightSource:
    return open_source(folder, ModelConfig.from_folder(folder).quantization)


def test_four_bit_rows_that_begin_within_elements_are_cut_from_the_whole(tmp_path: Path) -> None:
    """Rows of 4 numbers, 8 to an element of 4 bytes."""
    parts, numbers = test_bitsandbytes.four_bits(torch.empty(64, 4), 0, storage=torch.float32)
    name = "layer.weight"
    save_file({f"layer.{part}": tensor for part, tensor in parts.items()}, tmp_path / "one.safetensors")
    form = checkpoint_format(CheckpointQuantization(method="bitsandbytes"))
    source = QuantizedSource(SafetensorsSource([tmp_path / "one.safetensors"], codes=True), form)
    part = source.read(name, Shard((15, 48), (1, 3)))
    assert torch.equal(as_float(part).double(), numbers[15:48, 1:3])


def shards(shape: tuple[int, ...]) -> list[Shard]:
    """Halves and thirds in both directions, one in the middle of everything, a single row."""
    rows = shape[0]
    found = [Shard((0, rows // 2)), Shard((rows // 2, rows)), Shard((rows // 3, 2 * (rows // 3))), Shard((1, 2))]
    if len(shape) == 2:
        columns = shape[1]
        found += [
            Shard(None, (0, columns // 2)),
            Shard(None, (columns // 2, columns)),
            Shard(None, (columns // 4, columns // 2)),
        ]
        found += [Shard((rows // 4, rows // 2), (columns // 3, 2 * (columns // 3))), Shard(None, (5, 29))]
    return found  # fmt: skip


def cut(tensor: Tensor, shard: Shard) -> Tensor:
    rows = tensor[slice(*(shard.rows or (None, None)))]
    return rows if shard.columns is None else rows[:, slice(*shard.columns)]


@pytest.mark.parametrize(
    ("name", "shape"),
    # Groups of 64 do not divide the uneven sizes.
    [(name, SHAPE) for name in FORMATS] + [(name, UNEVEN) for name in FORMATS if name != "integers-awq-64"],
)
def test_every_part_has_the_numbers_of_the_whole(
    tmp_path: Path, name: str, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_module, "_PIECE_BYTES", 3000)
    FORMATS[name](tmp_path, shape)
    source = source_of(tmp_path)
    for tensor in source.names():
        whole = source.read(tensor, WHOLE)
        for shard in shards(source.shape(tensor)):
            part = source.read(tensor, shard)
            assert tuple(part.shape) == shard.shape(source.shape(tensor)), (tensor, shard)
            assert torch.equal(as_float(part), cut(as_float(whole), shard)), (tensor, shard)
            if shard.columns is None:
                # Rows never become floats.
                assert type(part) is type(whole), (tensor, shard)


def test_the_log_says_which_weights_become_floats_and_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FORMATS["integers-gptq-ordered"](tmp_path / "scattered", SHAPE)
    FORMATS["integers-awq-32"](tmp_path / "ordered", SHAPE)
    name = f"{LAYER}.mlp.down_proj.weight"
    with caplog.at_level(logging.WARNING):
        assert not isinstance(source_of(tmp_path / "ordered").read(name, Shard(None, (96, 192))), Tensor)
        assert not isinstance(source_of(tmp_path / "scattered").read(name, Shard((0, 64))), Tensor)
        assert caplog.text == ""
        assert isinstance(source_of(tmp_path / "scattered").read(name, Shard(None, (96, 192))), Tensor)
        assert isinstance(source_of(tmp_path / "ordered").read(name, Shard(None, (8, 104))), Tensor)
    scattered, fine = [record.getMessage() for record in caplog.records]
    assert f"{LAYER}.mlp.down_proj" in scattered
    assert (
        "kept as float32 on this rank, because its groups are scattered over the input features (act-order)"
        in scattered
    )
    assert "because the borders of the part cut its groups of input features too finely" in fine
