"""A process that holds a part of a model has the numbers of the whole model there, and reads little else."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.core import gguf
from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.native import native_available
from penstock.execution.layers.embedding import VocabEmbedding
from penstock.execution.layers.linear import Linear
from penstock.execution.models.decoder import CausalLM
from penstock.execution.models.dummy import DummySource
from penstock.execution.models.loader import LoadOptions, load_weights
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.models.source import open_source
from penstock.execution.parallel import shard_reading
from penstock.execution.parallel.groups import ModelPart, PipelineStage, TensorParallel
from penstock.execution.parallel.sharding import Shard
from penstock.execution.quantization import weight_cache
from penstock.testing import ranks
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel
from tests.execution.parallel.test_shard_reading import READS, bytes_read
from tests.execution.quantization import test_bitsandbytes, test_formats, test_fp8
from tests.execution.quantization.quantized_checkpoints import write_quantized, write_replaced
from tests.gguf_files import QuantizationType, write_gguf

CPU = torch.device("cpu")
# Of a vocabulary of 271, the last of several ranks has less than the others.
SHAPE: dict[str, Any] = {
    "vocab_size": 271,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 16,
    "hidden_size": 128,
}


def part_of_model(rank: int = 0, size: int = 1, stage: int = 0, stages: int = 1) -> ModelPart:
    return ModelPart(TensorParallel(rank, size), PipelineStage(stage, stages))


def load(folder: Path, part: ModelPart | None = None, **settings: Any) -> LoadedModel:
    config = EngineConfig(**({"weight_cache": False} | settings))
    return load_model(config, folder, CPU, torch.float32, progress=False, part=part or ModelPart())


def linears(model: CausalLM) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def outputs(linear: Linear) -> tuple[Tensor, Tensor]:
    """What a layer computes with: its weight with the bias added to each column, the products of single features, and its bias."""
    return linear.kernel(torch.eye(linear.in_features)).T, linear.kernel(torch.zeros(1, linear.in_features))[0]


def check_layer(whole: Linear, linear: Linear, rank: int) -> None:
    """`linear`, of a part of the model, has the numbers of the whole layer, and the bias where it is to be added."""
    weight, bias = outputs(whole)
    rows, start = [], 0
    columns = slice(None)
    for (name, _), slot in linear.slots().items():
        if name == "weight":
            first, last = slot.shard.rows or (0, slot.shape[0])
            rows.append(torch.arange(start + first, start + last))
            start += slot.shape[0]
            columns = slice(*(slot.shard.columns or (None, None)))
    chosen = torch.cat(rows)
    actual_weight, actual_bias = outputs(linear)
    if columns == slice(None) or rank == 0:
        assert torch.equal(actual_weight, weight[chosen, columns])
        assert torch.equal(actual_bias, bias[chosen])
    else:
        assert not actual_bias.any()
        error = (actual_weight - (weight - bias.unsqueeze(1))[chosen, columns]).abs().max()
        assert error == 0 if not bias.any() else error < 1e-6


def check_part(whole: LoadedModel, loaded: LoadedModel) -> None:
    """All weights of a part are those of the whole model."""
    layers = dict(linears(whole.model))
    names = {name for name, _ in linears(loaded.model)}
    layers_of_names = {name.split(".")[2] for name in names}
    assert layers_of_names == {str(layer) for layer in loaded.part.stage.layers(whole.config.num_layers)}
    for name, linear in linears(loaded.model):
        check_layer(layers[name], linear, loaded.part.tensor.rank)
    tokens = torch.arange(whole.config.vocab_size)
    table = loaded.model.model.embed_tokens
    if loaded.part.stage.is_first:
        assert isinstance(table, VocabEmbedding)
        whole_table = whole.model.model.embed_tokens
        assert whole_table is not None
        first, last = table.rows
        assert torch.equal(table.table(tokens[: last - first]), whole_table.table(tokens[first:last]))
    if loaded.part.stage.is_last:
        head, whole_head = loaded.model.lm_head, whole.model.lm_head
        assert head is not None
        assert whole_head is not None
        x = torch.eye(whole.config.hidden_size)
        assert torch.equal(head.kernel(x), whole_head.kernel(x)[:, slice(*head.rows)])
    assert loaded.num_parameters == whole.num_parameters
    assert loaded.model_hash == whole.model_hash
    assert loaded.weight_bytes < whole.weight_bytes


PARTS = [
    part_of_model(0, 2),
    part_of_model(3, 4),
    part_of_model(0, 1, 0, 2),
    part_of_model(0, 1, 1, 2),
    part_of_model(1, 2, 2, 3),
]


@pytest.mark.parametrize("setting", ["auto", "int8", "int4", "none"])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_of_a_plain_model(tmp_path: Path, tied: bool, setting: str) -> None:
    folder = write_tiny_checkpoint(
        tmp_path,
        "qwen2" if tied else "llama",
        tie_word_embeddings=tied,
        attention_bias=True,
        mlp_bias=not tied,
        **SHAPE,
    )
    whole = load(folder, quantization=setting)
    assert (whole.num_layers, whole.part) == (3, ModelPart())
    for part in PARTS:
        loaded = load(folder, part, quantization=setting)
        assert loaded.part is part
        assert loaded.num_layers == len(part.stage.layers(3))
        assert loaded.cache_spec.num_kv_heads == max(1, 2 // part.tensor.size)
        check_part(whole, loaded)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_ranks_have_experts_whole(tmp_path: Path, model_type: Literal["mixtral", "qwen3_moe"]) -> None:
    shape = SHAPE | {"num_experts": 6, "mlp_only_layers": [1]}
    folder = write_tiny_checkpoint(tmp_path, model_type, **shape)
    whole = load(folder, quantization="int8")
    for part in (part_of_model(1, 4), part_of_model(1, 2, 1, 2)):
        loaded = load(folder, part, quantization="int8")
        check_part(whole, loaded)
        experts = {name.split(".")[-2] for name, _ in linears(loaded.model) if ".experts." in name}
        assert experts == ({"2", "3"} if part.tensor.size == 4 else {"3", "4", "5"})


@pytest.mark.parametrize("case", ["awq-32", "gptq-zeros", "gptq-ordered", "packed-8", "integers-groups-zeros"])
def test_parts_of_quantised_models(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    section, parts, options = test_formats.CASES[case]
    write_quantized(tmp_path, section, parts, **(options | SHAPE))
    whole = load(tmp_path, quantization="none")
    for part in PARTS:
        with caplog.at_level(logging.WARNING):
            check_part(whole, load(tmp_path, part, quantization="none"))
            compact = load(tmp_path, part)
        bits = options.get("bits", 4)
        assert compact.quantization.startswith(f"int{bits} group 32")
    # Act-order: input features of a rank are of all groups, unevenly.
    assert ("act-order" in caplog.text) is (case == "gptq-ordered")


def test_parts_of_a_gguf_model(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tokenizer=True, tie_word_embeddings=True, intermediate_size=128, **SHAPE)
    write_gguf(folder, tmp_path / "model.gguf", quantization=QuantizationType.Q4_0, embedding=QuantizationType.Q8_0)
    whole = load(tmp_path)
    check_part(load(tmp_path, quantization="none"), load(tmp_path, part_of_model(1, 2), quantization="none"))
    loaded = load(tmp_path, part_of_model(1, 2, 1, 2))
    assert (loaded.quantization, loaded.model_hash) == (whole.quantization, whole.model_hash)


@pytest.mark.parametrize("setting", ["auto", "int8"])
def test_dummy_weights_are_those_of_the_whole_model(tmp_path: Path, setting: str) -> None:
    folder = write_tiny_checkpoint(tmp_path, "qwen3", **SHAPE)
    (folder / "model.safetensors").unlink()
    whole = load(folder, load_format="dummy", seed=3, quantization=setting)
    for part in PARTS:
        check_part(whole, load(folder, part, load_format="dummy", seed=3, quantization=setting))


def test_columns_of_dummy_numbers() -> None:
    source = DummySource({"a": (7, 5), "b": (3000, 700), "c.norm.weight": (16,)}, torch.float32, seed=0)
    whole = source.read("b")
    assert torch.equal(source.read("b", Shard(None, (350, 700))), whole[:, 350:])
    assert torch.equal(source.read("b", Shard((10, 2500), (3, 4))), whole[10:2500, 3:4])
    assert torch.equal(source.read("b", Shard((2999, 3000))), whole[2999:])
    assert torch.equal(source.read("c.norm.weight", Shard((4, 8))), torch.ones(4))


def test_what_is_wrong_with_a_checkpoint_is_wrong_on_every_rank(tmp_path: Path) -> None:
    """Also for tensors of layers that the process does not have."""
    file = write_tiny_checkpoint(tmp_path, **SHAPE) / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.2.mlp.up_proj.weight"
    first_stage = part_of_model(0, 1, 0, 2)
    changes: dict[str, tuple[dict[str, Tensor], str]] = {
        "missing": ({key: value for key, value in weights.items() if key != name}, rf"missing tensors: {name}"),
        "mis-shaped": (weights | {name: torch.ones(48, 128)}, r"up_proj\.weight' has shape \[48, 128\], config\.json asks for \[96, 128\]"),
        "unexpected": (weights | {"model.layers.3.mlp.up_proj.weight": torch.ones(96, 128)}, r"unexpected tensor 'model\.layers\.3"),
    }  # fmt: skip
    for tensors, message in changes.values():
        save_file(tensors, file)
        with pytest.raises(ModelFormatError, match=message):
            load(tmp_path, first_stage)


def test_models_that_cannot_be_divided(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, num_heads=4, num_kv_heads=2)
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3 does not divide the model's 4 attention heads"):
        load(folder, part_of_model(0, 3))
    with pytest.raises(ConfigError, match="--pipeline-parallel-size 3"):
        load(folder, part_of_model(0, 1, 0, 3))


@pytest.mark.skipif(not native_available(), reason="there are no native kernels")
def test_each_part_has_its_own_packed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_cache, "MIN_BYTES", 0)
    folder = write_tiny_checkpoint(tmp_path / "model", **SHAPE)
    whole = load(folder, quantization="int8")
    parts = [ModelPart(), *PARTS, part_of_model(1, 2)]
    for part in parts:
        made = load(folder, part, quantization="int8", weight_cache=True).pending_cache
        assert made is not None
        assert made.write()
    assert len(list((tmp_path / "cache" / "weights").iterdir())) == len(parts)
    for part in PARTS:
        loaded = load(folder, part, quantization="int8", weight_cache=True)
        assert loaded.pending_cache is None
        check_part(whole, loaded)


@pytest.mark.parametrize("case", ["awq-64", "gptq-ordered", "integers", "packed-8-zeros-128"])
def test_quantised_parts_compute_what_the_whole_computes(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native kernels round a layer's input to 8 bits with one scale for all of it, or per group, which ranks have less of."""
    section, parts, options = test_formats.CASES[case]
    write_quantized(tmp_path, section, parts, **(options | SHAPE | {"intermediate_size": 256}))
    whole = load(tmp_path)
    source = open_source(tmp_path, whole.config.quantization)

    def fill(model: CausalLM, _weights: Mapping[str, Tensor]) -> None:
        load_weights(model, source, LoadOptions(), whole.model)
        model.finish_loading()

    monkeypatch.setattr(ranks, "fill_from_whole", fill)
    head = whole.model.lm_head
    assert head is not None
    ranked = ranks.RankedModel(tmp_path, head.options, tensor_parallel_size=2, stages=2)
    tokens = list(range(30, 60))
    expected, actual = (model.step({"a": tokens})["a"] for model in (PagedModel(whole), ranked))
    divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - actual.log_softmax(-1))).sum(-1)
    assert divergence.mean() < 1e-3


@pytest.fixture
def short_rows_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of these models are read as those of large ones are: only the part of each."""
    monkeypatch.setattr(shard_reading, "_SKIPPED_FROM", 64)


def share_read(folder: Path, file: str, part: ModelPart, **settings: Any) -> float:
    """Of the bytes of the weight file, those that loading a part reads."""
    load(folder, part, **settings)
    return bytes_read(lambda: load(folder, part, **settings)) / (folder / file).stat().st_size


LARGE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 512,
}  # fmt: skip


@pytest.mark.skipif(not READS.exists(), reason="the system does not say what was read")
@pytest.mark.usefixtures("short_rows_are_long")
def test_each_rank_reads_its_part_of_a_plain_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, dtype="bfloat16", **LARGE)
    file = "model.safetensors"
    # All of it, and the headers of file and model.
    assert 1 < share_read(folder, file, ModelPart()) < 1.01
    for rank in range(2):
        assert share_read(folder, file, part_of_model(rank, 2)) == pytest.approx(0.5, abs=0.01)
    assert share_read(folder, file, part_of_model(3, 4)) == pytest.approx(0.25, abs=0.01)
    sizes = {name: tensor.nbytes for name, tensor in load_file(folder / file).items()}
    total = sum(sizes.values())
    for stage, own in enumerate((("layers.0", "embed_tokens"), ("layers.1", "model.norm", "lm_head"))):
        expected = sum(size for name, size in sizes.items() if any(part in name for part in own)) / total
        assert share_read(folder, file, part_of_model(0, 1, stage, 2)) == pytest.approx(expected, abs=0.01)
    # Scales of whole rows need whole rows, of the weights that are split along them.
    split = sum(size for name, size in sizes.items() if "o_proj" in name or "down_proj" in name)
    expected = (total + split) / 2 / total
    assert share_read(folder, file, part_of_model(0, 2), quantization="int8") == pytest.approx(expected, abs=0.01)
    assert share_read(folder, file, part_of_model(0, 2), quantization="int4") == pytest.approx(0.5, abs=0.01)


@pytest.mark.skipif(not READS.exists(), reason="the system does not say what was read")
@pytest.mark.usefixtures("short_rows_are_long")
@pytest.mark.parametrize("case", ["awq-32", "gptq", "packed-zeros", "packed-8"])
def test_each_rank_reads_its_part_of_a_quantised_checkpoint(tmp_path: Path, case: str) -> None:
    section, parts, options = test_formats.CASES[case]
    write_quantized(tmp_path, section, parts, **(options | LARGE))
    assert share_read(tmp_path, "model.safetensors", part_of_model(1, 2)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.skipif(not READS.exists(), reason="the system does not say what was read")
@pytest.mark.usefixtures("short_rows_are_long")
@pytest.mark.parametrize("form", ["bitsandbytes", "fp8"])
def test_each_rank_reads_its_part_of_codebooks_and_8_bit_floats(tmp_path: Path, form: str) -> None:
    if form == "fp8":
        quantize = partial(test_fp8.quantize, **test_fp8.BLOCKS)
        write_replaced(tmp_path, test_fp8.fp8(), quantize, **(LARGE | {"dtype": "bfloat16"}))
    else:
        write_replaced(
            tmp_path, test_bitsandbytes.section(), test_bitsandbytes.four_bits, **(LARGE | {"dtype": "bfloat16"})
        )
    assert share_read(tmp_path, "model.safetensors", part_of_model(1, 2)) == pytest.approx(0.5, abs=0.03)


@pytest.mark.skipif(not READS.exists(), reason="the system does not say what was read")
@pytest.mark.usefixtures("short_rows_are_long")
def test_each_rank_reads_its_part_of_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Or half of this small file is read with its head.
    monkeypatch.setattr(gguf, "_CHUNK_BYTES", 4096)
    folder = write_tiny_checkpoint(tmp_path, tokenizer=True, **LARGE)
    write_gguf(folder, tmp_path / "model.gguf", quantization=QuantizationType.Q8_0)
    assert share_read(folder, "model.gguf", part_of_model(1, 2)) == pytest.approx(0.5, abs=0.02)
