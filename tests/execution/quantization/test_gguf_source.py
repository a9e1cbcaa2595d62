"""GGUF's weights: each block format against llama.cpp's own package, and a file's tensors under a checkpoint's names."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from penstock.core.errors import ModelFormatError
from penstock.core.gguf_format import TENSOR_TYPES
from penstock.execution.kernels.quantized import QuantizedTensor
from penstock.execution.layers.weight import as_float
from penstock.execution.quantization import gguf as gguf_module
from penstock.execution.quantization.gguf import GGUFSource, checkpoint_name
from penstock.execution.quantization.gguf_blocks import BLOCK_FORMATS
from penstock.testing.checkpoints import ModelType, write_tiny_checkpoint
from tests.gguf_files import (
    QuantizationType,
    checkpoint_tensors,
    gguf_name,
    quantize_q4_k,
    quantize_q6_k,
    raw_file,
    tensor_entry,
    write_gguf,
)

# Bytes of a block at which a float16 starts; random bytes there could be no number.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def random_blocks(name: str, count: int) -> NDArray[np.uint8]:
    kind = gguf.GGMLQuantizationType[name]
    generator = np.random.default_rng(list(BLOCK_FORMATS).index(name))
    blocks = generator.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for start in HALVES[name]:
        blocks[:, start : start + 2] = generator.normal(size=(count, 1)).astype(np.float16).view(np.uint8)
    return blocks


def test_sizes_of_blocks_are_those_of_the_format() -> None:
    ours = {number: (kind.name, kind.block_values, kind.block_bytes) for number, kind in TENSOR_TYPES.items()}
    theirs = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    # The package still has the layout of an old version; no file has this type of llama.cpp's intermediate results.
    theirs[9] = ("Q8_1", 32, 2 + 2 + 32)
    assert ours == theirs


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_every_weight_of_a_block_is_the_one_of_the_reference(name: str) -> None:
    blocks = random_blocks(name, 64)
    block_format = BLOCK_FORMATS[name]
    codes, scales, offsets = block_format.decode(torch.from_numpy(blocks))
    assert codes.dtype == torch.uint8
    assert scales.dtype == torch.float32
    assert int(codes.max()) < 1 << block_format.bits
    ours = QuantizedTensor(codes, block_format.bits, block_format.group_size, scales, offsets).dequantize()
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=0)


@pytest.mark.parametrize("pack", [quantize_q4_k, quantize_q6_k])
def test_the_packers_of_these_tests_round_as_their_format_can(pack: object) -> None:
    values = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    kind, most = (QuantizationType.Q4_K, 0.25) if pack is quantize_q4_k else (QuantizationType.Q6_K, 0.07)
    back = gguf.quants.dequantize(pack(values), kind)  # type: ignore[operator]
    assert np.abs(back - values).max() < most


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of these tests are read in several pieces, the last of them shorter."""
    monkeypatch.setattr(gguf_module, "_PIECE_BYTES", 3000)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_float_tensors_are_those_of_the_checkpoint(tmp_path: Path, model_type: ModelType) -> None:
    folder = write_tiny_checkpoint(
        tmp_path, model_type, tokenizer=True, attention_bias=True, mlp_bias=model_type == "llama"
    )
    source = GGUFSource(write_gguf(folder, tmp_path / "model.gguf"))
    expected = checkpoint_tensors(folder)
    assert sorted(source.names()) == sorted(expected)
    for name, values in expected.items():
        tensor = source.read(name)
        assert isinstance(tensor, torch.Tensor)
        assert torch.equal(tensor, torch.from_numpy(values)), name
        assert source.shape(name) == values.shape
        assert source.nbytes(name) == values.nbytes
        assert source.where(name) == f"{tmp_path / 'model.gguf'}: tensor {gguf_name(name)}"


@pytest.mark.parametrize("kind", [QuantizationType.F16, QuantizationType.BF16])
def test_half_precision_stays_what_it_is(tmp_path: Path, kind: QuantizationType) -> None:
    dtype = torch.float16 if kind is QuantizationType.F16 else torch.bfloat16
    folder = write_tiny_checkpoint(tmp_path, tokenizer=True)
    source = GGUFSource(write_gguf(folder, tmp_path / "model.gguf", quantization=kind))
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = source.read(name)
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, torch.from_numpy(checkpoint_tensors(folder)[name]).to(dtype))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "symmetric"),
    [
        (QuantizationType.Q8_0, 8, 32, True),
        (QuantizationType.Q4_0, 4, 32, True),
        (QuantizationType.Q4_1, 4, 32, False),
        (QuantizationType.Q5_0, 8, 32, True),
        (QuantizationType.Q4_K, 4, 32, False),
        (QuantizationType.Q6_K, 8, 16, True),
    ],
)
def test_quantised_tensors_are_what_the_reference_makes_of_the_file(
    tmp_path: Path, kind: QuantizationType, bits: int, group_size: int, symmetric: bool
) -> None:
    folder = write_tiny_checkpoint(tmp_path, hidden_size=256, intermediate_size=512, tokenizer=True)
    file = write_gguf(folder, tmp_path / "model.gguf", quantization=kind)
    source = GGUFSource(file)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    heads = {"q_proj": 4, "k_proj": 2}
    for name in source.names():
        tensor = source.read(name)
        reference = stored[gguf_name(name)]
        values = torch.from_numpy(gguf.quants.dequantize(reference.data, reference.tensor_type).copy())
        if name.split(".")[-2] in heads:
            rows = values.view(heads[name.split(".")[-2]], -1, 2, values.shape[1])
            values = rows.transpose(1, 2).reshape(values.shape)
        if isinstance(tensor, QuantizedTensor):
            assert (tensor.bits, tensor.group_size, tensor.offsets is None) == (bits, group_size, symmetric)
            assert tensor.codes.shape == source.shape(name)
            tensor = tensor.dequantize()
        else:
            assert len(source.shape(name)) == 1
        assert torch.equal(as_float(tensor), values), name


def test_names_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tokenizer=True)
    file = write_gguf(folder, tmp_path / "model.gguf")
    stored = [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    assert [gguf_name(name) for name in GGUFSource(file).names()] == stored


def test_a_split_model_is_one_source(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tokenizer=True)
    whole = write_gguf(folder, tmp_path / "whole.gguf")
    parts = split(whole, 3)
    one, many = GGUFSource(whole), GGUFSource(parts[1])
    assert set(one.names()) == set(many.names())
    for name in one.names():
        assert torch.equal(one.read(name), many.read(name))  # type: ignore[arg-type]
    parts[2].unlink()
    with pytest.raises(ModelFormatError, match=r"the part whole-00003-of-00003\.gguf is missing"):
        GGUFSource(parts[0])


def split(whole: Path, count: int) -> list[Path]:
    """The file in `count` parts, as llama.cpp's gguf-split makes them; the metadata but for the essential is left out."""
    reader = gguf.GGUFReader(whole)
    paths = [whole.with_name(f"{whole.stem}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (tensor_entry("blk.0.ffn_gate_inp.weight", [32, 4], 0, 0), "the models that can be run have no such tensor"),
        (tensor_entry("blk.00.ffn_up.weight", [32, 4], 0, 0), "no such tensor"),
        (tensor_entry("blk.0.ffn_up.weight", [256, 2], 16, 0), "type IQ2_XXS; supported: F32, F16, BF16, Q4_0"),
        (tensor_entry("blk.0.ffn_up.weight", [32, 2, 2], 0, 0), "shape"),
        (tensor_entry("blk.0.attn_norm.weight", [32], 8, 0), "shape"),
        (tensor_entry("blk.0.attn_q.weight", [32, 6], 0, 0), "6 rows, no even number for each of 2 heads"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, entry: bytes, message: str) -> None:
    file = tmp_path / "model.gguf"
    pairs = [
        b"\x14\0\0\0\0\0\0\0general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        b"\x1a\0\0\0\0\0\0\0llama.attention.head_count\x04\0\0\0\x02\0\0\0",
    ]
    file.write_bytes(raw_file(pairs, [entry], bytes(4096)))
    with pytest.raises(ModelFormatError, match=message) as caught:
        GGUFSource(file)
    assert "model.gguf: tensor 'blk.0" in str(caught.value)


def test_a_file_that_shrinks_is_an_error_not_garbage(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tokenizer=True)
    file = write_gguf(folder, tmp_path / "model.gguf", quantization=QuantizationType.Q8_0)
    source = GGUFSource(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelFormatError, match="ends too early"):
        source.read(source.names()[-1])


def test_names_without_a_place() -> None:
    assert checkpoint_name("blk.12.attn_k_norm.weight") == "model.layers.12.self_attn.k_norm.weight"
    assert checkpoint_name("blk.3.attn_q.bias") == "model.layers.3.self_attn.q_proj.bias"
    for name in ("token_embd.bias", "blk.1.attn_q", "blk.-1.attn_q.weight", "output", "attn_q.weight"):
        assert checkpoint_name(name) is None
