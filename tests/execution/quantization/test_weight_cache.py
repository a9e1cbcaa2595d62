"""Packed weights on disk: the second start maps what the first one made, and never uses anything else."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.quantized import StoredWeight
from penstock.execution.layers.weight import Slot
from penstock.execution.models import loader
from penstock.execution.models.loader import LoadOptions
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.models.source import WeightSource
from penstock.execution.quantization import weight_cache
from penstock.execution.quantization.weight_cache import WeightCache, content_key, default_folder, make_room
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel

pytestmark = pytest.mark.skipif(not native_available(), reason="no native kernels in this installation")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_cache, "MIN_BYTES", 1)
    return tmp_path / "cache" / "weights"


def load(folder: Path, **settings: object) -> LoadedModel:
    config = EngineConfig(**settings)  # type: ignore[arg-type]
    return load_model(config, folder, CPU, torch.float32, progress=False)


def logits(loaded: LoadedModel) -> Tensor:
    return PagedModel(loaded).step({"a": list(range(40))})["a"]


def write(loaded: LoadedModel) -> Path:
    assert loaded.pending_cache is not None
    assert loaded.pending_cache.write()
    return loaded.pending_cache.cache.file


@pytest.mark.parametrize("quantization", ["auto", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_second_start_is_the_first(
    tmp_path: Path, quantization: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_checkpoint(
        tmp_path, "qwen2", dtype="bfloat16", tie_word_embeddings=tied, vocab_size=300, intermediate_size=96
    )
    first = load(folder, quantization=quantization)
    assert first.pending_cache is not None
    first.pending_cache.write_in_background().join()
    file = first.pending_cache.cache.file
    # The format's own library reads the file; all data is aligned.
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    del header["__metadata__"]
    assert set(load_file(file)) == set(header)
    assert all(entry["data_offsets"][0] % 64 == 0 for name, entry in header.items() if "padding" not in name)

    read: list[str] = []
    original = loader._read

    def recorded(source: WeightSource, name: str, slot: Slot, options: LoadOptions) -> StoredWeight:
        read.append(name)
        return original(source, name, slot, options)

    monkeypatch.setattr(loader, "_read", recorded)
    second = load(folder, quantization=quantization)
    assert [name for name in read if not name.endswith("norm.weight")] == (
        [] if tied else ["model.embed_tokens.weight"]
    )
    assert second.pending_cache is None
    assert second.quantization == first.quantization
    assert second.model_hash == first.model_hash
    assert second.weight_bytes == first.weight_bytes
    assert torch.equal(logits(second), logits(first))


def test_a_load_that_makes_little_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "MIN_BYTES", 2**26)
    assert load(write_tiny_checkpoint(tmp_path), quantization="int8").pending_cache is None


def test_switched_off(tmp_path: Path, cache: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    write(load(folder, quantization="int8"))
    loaded = load(folder, quantization="int8", weight_cache=False)
    assert loaded.pending_cache is None
    segments = loaded.model.lm_head.kernel.segments  # type: ignore[union-attr]
    assert load(folder, quantization="int8").model.lm_head.kernel.segments[0].data.equal(segments[0].data)  # type: ignore[union-attr]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:5],
        lambda data: data[:1000],
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: data.replace(b'\\"group_size\\": 32', b'\\"group_size\\": 16', 1),
        lambda data: data.replace(b'\\"int4\\"', b'\\"int8\\"', 1),
        lambda data: data.replace(b'"layout": "1"', b'"layout": "9"', 1),
    ],
)  # fmt: skip
def test_a_damaged_file_is_not_used(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    first = load(folder, quantization="int4")
    file = write(first)
    content = file.read_bytes()
    file.write_bytes(damage(content))
    if file.read_bytes() == content:
        pytest.fail("the file is as it was")
    with caplog.at_level(logging.WARNING):
        again = load(folder, quantization="int4")
    assert "cached weights are not used" in caplog.text
    assert torch.equal(logits(again), logits(first))
    assert write(again).read_bytes() == content


def test_a_file_of_another_model_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = load(write_tiny_checkpoint(tmp_path / "a"), quantization="int8")
    two = load(write_tiny_checkpoint(tmp_path / "b", seed=1), quantization="int8")
    assert two.pending_cache is not None
    write(one).rename(two.pending_cache.cache.file)
    with caplog.at_level(logging.WARNING):
        again = load(tmp_path / "b", quantization="int8")
    assert "was made from something else" in caplog.text
    assert torch.equal(logits(again), logits(two))


def test_the_key_follows_everything_that_weights_depend_on(tmp_path: Path) -> None:
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text("{}")
    content = bytearray(8 << 20)
    file.write_bytes(content)
    keys = {content_key(config, [file], {"quantization": "int8"})}
    assert content_key(config, [file], {"quantization": "int8"}) in keys
    keys.add(content_key(config, [file], {"quantization": "int4"}))
    keys.add(content_key(config, [], {"quantization": "int8"}))
    for position in (100, len(content) - 1, len(content) // 63 * 40):
        content[position] ^= 1
        file.write_bytes(content)
        keys.add(content_key(config, [file], {"quantization": "int8"}))
    file.write_bytes(content[:-1])
    keys.add(content_key(config, [file], {"quantization": "int8"}))
    config.write_text("{ }")
    keys.add(content_key(config, [file], {"quantization": "int8"}))
    assert len(keys) == 8


def test_those_used_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "MAX_BYTES", 100)
    now = time.time()
    for name, age in (("old", 300), ("older", 400), ("new", 10)):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(bytes(30))
        os.utime(file, (now - age, now - age))
    for name, age in ((".writing-dead", 90_000), (".writing-alive", 10)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    make_room(tmp_path, 10)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        ".writing-alive", "new.safetensors", "old.safetensors", "older.safetensors",
    ]  # fmt: skip
    make_room(tmp_path, 50)
    assert sorted(file.stem for file in tmp_path.glob("*.safetensors")) == ["new"]


def test_using_a_file_makes_it_young(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    file = write(load(folder, quantization="int8"))
    os.utime(file, (1000, 1000))
    load(folder, quantization="int8")
    assert file.stat().st_mtime > 1000


def test_what_cannot_be_written_is_only_logged(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pending = load(write_tiny_checkpoint(tmp_path), quantization="int8").pending_cache
    assert pending is not None
    monkeypatch.setattr(weight_cache, "_SPARE_BYTES", 2**60)
    with caplog.at_level(logging.INFO):
        assert not pending.write()
    assert "are not cached" in caplog.text
    assert list(cache.iterdir()) == []
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    assert not pending.write()
    assert "could not be cached" in caplog.text


def test_default_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_folder() == tmp_path / "cache" / "weights"
    monkeypatch.delenv("PENSTOCK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_folder() == Path("/x/penstock/weights")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "penstock" / "weights"
    assert WeightCache(Path("/x"), "k").file == Path("/x/k.safetensors")
