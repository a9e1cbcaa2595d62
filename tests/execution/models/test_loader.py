"""Loading: every tensor in its place, and every broken checkpoint an error that names file and tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.native import native_available
from penstock.execution.models.dummy import DummySource
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.models.safetensors_file import read_header
from penstock.execution.models.source import RowSource, SafetensorsSource
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel

CPU = torch.device("cpu")


def load(folder: Path, config: EngineConfig | None = None) -> LoadedModel:
    return load_model(config or EngineConfig(), folder, CPU, torch.float32, progress=False)


def logits(loaded: LoadedModel) -> Tensor:
    return PagedModel(loaded).step({"a": list(range(40))})["a"]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_numbers_of_a_loaded_model(tmp_path: Path) -> None:
    loaded = load(write_tiny_checkpoint(tmp_path, dtype="bfloat16"))
    stored = load_file(tmp_path / "model.safetensors")
    assert loaded.num_parameters == sum(tensor.numel() for tensor in stored.values())
    # Norms have the type of activations; what the layers keep depends on their kernels.
    size = 2 if native_available() else 4
    norms = sum(tensor.numel() for name, tensor in stored.items() if name.endswith("norm.weight"))
    table = stored["model.embed_tokens.weight"].nbytes
    assert loaded.weight_bytes == 4 * norms + table + size * (loaded.num_parameters - norms - table // 2)
    assert loaded.config.dtype == torch.bfloat16
    assert loaded.activation_dtype == torch.float32
    assert loaded.quantization == "none"
    assert loaded.pending_cache is None


def test_tied_weights_count_once(tmp_path: Path) -> None:
    tied = load(write_tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    untied = load(write_tiny_checkpoint(tmp_path / "untied"))
    assert untied.num_parameters - tied.num_parameters == 272 * 64


def test_hash_follows_configuration_and_sizes(tmp_path: Path) -> None:
    one = load(write_tiny_checkpoint(tmp_path / "a")).model_hash
    assert load(write_tiny_checkpoint(tmp_path / "b")).model_hash == one
    assert load(write_tiny_checkpoint(tmp_path / "c", num_shards=2)).model_hash != one
    assert load(write_tiny_checkpoint(tmp_path / "d", max_position_embeddings=256)).model_hash != one


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_model(EngineConfig(), write_tiny_checkpoint(tmp_path), CPU, torch.float32, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Loading weights" in captured.err
    assert "100%" in captured.err


def test_weights_that_say_nothing_new_are_ignored(tmp_path: Path) -> None:
    """Old checkpoints store rotary frequencies; some tied ones store the output head as well."""
    write_tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = logits(load(tmp_path))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": torch.ones(272, 64)}
    rewrite(tmp_path, lambda weights: weights.update(extra))
    assert torch.equal(logits(load(tmp_path)), expected)


def test_missing_tensor(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ModelFormatError, match=r"missing tensors: model\.layers\.1\.self_attn\.k_proj\.weight\.$"):
        load(tmp_path)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    rewrite(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if ".mlp." in name])
    with pytest.raises(ModelFormatError, match=r"mlp\.gate_proj\.weight.* and 1 more\.$"):
        load(tmp_path)


def test_unexpected_tensor(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(
        ModelFormatError, match=r"model\.safetensors: unexpected tensor 'model\.layers\.0.*q_proj\.bias'"
    ):
        load(tmp_path)


def test_misshaped_tensor(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"model.layers.0.self_attn.v_proj.weight": torch.ones(16, 64)}))
    with pytest.raises(
        ModelFormatError, match=r"v_proj\.weight' has shape \[16, 64\], config\.json asks for \[32, 64\]"
    ):
        load(tmp_path)


def test_unsupported_tensor_type(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ModelFormatError, match=r"'model\.norm\.weight' has type 'I8'.*supported: F64, F32, F16, BF16"):
        load(tmp_path)


def test_tensor_in_two_files(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, num_shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    weights = load_file(first)
    save_file(weights | load_file(second), second)
    with pytest.raises(ModelFormatError, match=f"{second.name}: tensor .* is in {first.name} as well"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    file = write_tiny_checkpoint(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelFormatError, match=r"model\.safetensors is (truncated|no safetensors file)"):
        load(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        [],
    ],
)
def test_malformed_header_entry(tmp_path: Path, entry: object) -> None:
    write_tiny_checkpoint(tmp_path)
    header = json.dumps({"model.norm.weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelFormatError, match=r"header entry of 'model\.norm\.weight' is malformed"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "size", "message"),
    [
        ([(0, 4), (4, 8)], 6, r"is truncated: 6 of 8 bytes"),
        ([(0, 4), (4, 8)], 9, r"has 1 bytes after its last tensor"),
        ([(0, 4), (0, 4)], 4, r"tensor 'b' does not begin where"),
        ([(0, 4), (5, 9)], 9, r"tensor 'b' does not begin where"),
    ],
)
def test_header_that_does_not_fit_the_file(
    tmp_path: Path, offsets: list[tuple[int, int]], size: int, message: str
) -> None:
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": span} for name, span in zip("ab", offsets, strict=True)
    }
    header = json.dumps(entries).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(ModelFormatError, match=message):
        read_header(file)


def test_unreadable_metadata(tmp_path: Path) -> None:
    """Metadata may hold strings only."""
    file = write_tiny_checkpoint(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) | {"__metadata__": {"format": 3}}
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    with pytest.raises(ModelFormatError, match=r"model\.safetensors is no safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("header", [b"not json", b"[" * 200_000, b"[]", b"\xff\xfe\xfd"])
def test_header_that_is_no_object(tmp_path: Path, header: bytes) -> None:
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelFormatError, match="is no safetensors file"):
        load(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, num_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"model-00002-of-00002\.safetensors does not exist"):
        load(tmp_path)


def test_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, num_shards=2)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelFormatError, match=r"weight_map: '\.\./elsewhere\.safetensors' is no safetensors file of this"
    ):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFormatError, match=r"only as pytorch_model\.bin.*Convert the model to safetensors"):
        load(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"has no weights: neither model\.safetensors nor"):
        load(tmp_path)


def test_dummy_weights_need_only_the_configuration(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "qwen3", head_dim=32, hidden_size=256)
    (tmp_path / "model.safetensors").unlink()
    config = EngineConfig(load_format="dummy", seed=7)
    first, second = load(tmp_path, config), load(tmp_path, config)
    other = load(tmp_path, EngineConfig(load_format="dummy", seed=8))
    assert first.model_hash.startswith("dummy-7-")
    assert first.model_hash == second.model_hash != other.model_hash
    assert torch.equal(logits(first), logits(second))
    assert not torch.allclose(logits(first), logits(other))
    assert logits(first).std() > 0.05


def test_dummy_weights_are_normal_and_norms_are_ones() -> None:
    shapes = {"head.weight": (20_000, 64), "a.norm.weight": (64,), "b.bias": (3000,)}
    source = DummySource(shapes, torch.float32, seed=0)
    assert torch.equal(source.read("a.norm.weight"), torch.ones(64))
    head, bias = source.read("head.weight"), source.read("b.bias")
    assert head.std().item() == pytest.approx(0.02, rel=0.01)
    assert bias.std().item() == pytest.approx(0.02, rel=0.1)
    assert len(torch.unique(head, dim=0)) == 20_000
    assert torch.equal(source.read_rows("head.weight", 15_000, 17_000), head[15_000:17_000])
    assert sum(source.nbytes(name) for name in source.names()) == 4 * (20_000 * 64 + 64 + 3000)


def test_a_bias_of_zeros_says_nothing(tmp_path: Path) -> None:
    """Tools of GPTQ write one for every layer."""
    write_tiny_checkpoint(tmp_path)
    expected = logits(load(tmp_path))
    rewrite(tmp_path, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    assert torch.equal(logits(load(tmp_path)), expected)


def test_doubles_are_read_as_float32(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    expected = logits(load(tmp_path))
    rewrite(tmp_path, lambda weights: [weights.update({name: weights[name].double()}) for name in list(weights)])
    assert torch.equal(logits(load(tmp_path)), expected)


def test_rows_of_a_tensor(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, dtype="bfloat16")
    source = SafetensorsSource([tmp_path / "model.safetensors"])
    assert isinstance(source, RowSource)
    whole = source.read("model.embed_tokens.weight")
    assert whole.dtype == torch.bfloat16
    assert torch.equal(source.read_rows("model.embed_tokens.weight", 100, 107), whole[100:107])


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    file = write_tiny_checkpoint(tmp_path) / "model.safetensors"
    source = SafetensorsSource([file])
    os.truncate(file, file.stat().st_size - 64)
    with pytest.raises(ModelFormatError, match="became shorter while it was read"):
        [source.read(name) for name in source.names()]
