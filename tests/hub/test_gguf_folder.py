"""From a GGUF file to a model folder: what is in it, when it is made again, and how it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import pytest

from penstock.core.errors import ConfigError, ModelFormatError
from penstock.hub import resolve_model
from penstock.hub.gguf_folder import MAX_FOLDERS, gguf_cache_folder
from penstock.testing.checkpoints import CHAT_TEMPLATE, write_tiny_checkpoint
from tests.gguf_files import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", tokenizer=True)
    (tmp_path / "models").mkdir()
    return write_gguf(checkpoint, tmp_path / "models" / "tiny.Q8_0.gguf", quantization=gguf.GGMLQuantizationType.Q8_0)


def test_a_file_becomes_a_model_folder(file: Path, cache: Path) -> None:
    folder = resolve_model(str(file))
    assert folder.parent == cache
    assert folder.name.startswith("tiny.Q8_0-")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (folder / "model.gguf").readlink() == file
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 256, "eos_token_id": [257]}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_a_folder_is_made_once_and_again_when_the_file_changes(file: Path) -> None:
    folder = resolve_model(str(file))
    (folder / "config.json").write_text("kept")
    assert resolve_model(str(file)) == folder
    assert (folder / "config.json").read_text() == "kept"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = resolve_model(str(file))
    assert changed != folder
    assert json.loads((changed / "config.json").read_text())["model_type"] == "llama"


def test_the_least_recently_used_folders_go(file: Path, cache: Path, tmp_path: Path) -> None:
    old = [cache / f"old-{number:016x}" for number in range(MAX_FOLDERS + 3)]
    for age, path in enumerate(old):
        path.mkdir(parents=True)
        os.utime(path, (1000 - age, 1000 - age))
    (cache / ".new-left-by-a-killed-process").mkdir()
    os.utime(cache / ".new-left-by-a-killed-process", (0, 0))
    (cache / "not ours").mkdir()
    folder = resolve_model(str(file))
    left = {path.name for path in cache.iterdir()}
    assert left == {folder.name, "not ours", *(path.name for path in old[: MAX_FOLDERS - 1])}


def test_use_keeps_a_folder_young(file: Path) -> None:
    folder = resolve_model(str(file))
    os.utime(folder, (0, 0))
    resolve_model(str(file))
    assert folder.stat().st_mtime > 0


def test_a_broken_file_leaves_nothing_behind(file: Path, cache: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelFormatError, match="cut short"):
        resolve_model(str(file))
    assert not cache.exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gguf_cache_folder() == tmp_path / "cache" / "gguf"
    monkeypatch.delenv("PENSTOCK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf_cache_folder() == tmp_path / "xdg" / "penstock" / "gguf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gguf_cache_folder() == tmp_path / ".cache" / "penstock" / "gguf"


def test_a_cache_that_cannot_be_written_is_named(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match="set PENSTOCK_CACHE_DIR to a folder that can"):
        resolve_model(str(file))


# ---- what may be given ----


def test_a_folder_with_one_file(file: Path) -> None:
    expected = resolve_model(str(file))
    assert resolve_model(str(file.parent)) == expected
    (file.parent / "config.json").write_text('{"model_type": "mistral"}')
    assert resolve_model(str(file.parent)) == expected


def test_a_folder_with_several_files_lists_them(file: Path) -> None:
    other = file.with_name("tiny.Q4_0.gguf")
    other.write_bytes(file.read_bytes())
    with pytest.raises(
        ConfigError, match=r"holds 2 GGUF models; give one of them: .*tiny\.Q4_0\.gguf, .*tiny\.Q8_0\.gguf"
    ):
        resolve_model(str(file.parent))


def test_a_mistyped_file_is_answered_with_the_close_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    with pytest.raises(ConfigError, match=r"There is no file \./tiny\.Q8\.gguf\. Did you mean \./tiny\.Q8_0\.gguf\?"):
        resolve_model("./tiny.Q8.gguf")
    with pytest.raises(ConfigError, match=r"There is no file other/file\.gguf\. Give a GGUF file or a model folder\."):
        resolve_model("other/file.gguf")


def test_safetensors_win_over_gguf_files_beside_them(file: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    file.rename(checkpoint / file.name)
    assert resolve_model(str(checkpoint)) == checkpoint


def test_parts_of_one_model_are_one_model(file: Path) -> None:
    reader = gguf.GGUFReader(file)
    parts = [file.with_name(f"big-0000{number}-of-00002.gguf") for number in (1, 2)]
    for number, part in enumerate(parts):
        # The first part is the whole head with the first tensors, the second has tensors only.
        writer = gguf.GGUFWriter(part, "llama")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith(("GGUF.", "general.architecture")):
                    kind = field.types[0]
                    sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for tensor in reader.tensors[number::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    whole = json.loads((resolve_model(str(file)) / "config.json").read_text())
    file.unlink()
    folder = resolve_model(str(file.parent))
    assert json.loads((folder / "config.json").read_text()) == whole
    assert (folder / "model.gguf").readlink() == parts[0]
    assert resolve_model(str(parts[1])) == folder
    parts[1].unlink()
    with pytest.raises(ModelFormatError, match=r"big-00002-of-00002\.gguf cannot be read"):
        resolve_model(str(parts[0]))


def test_links_are_followed_by_name(file: Path, tmp_path: Path) -> None:
    """The hub's own cache holds links with names to files without."""
    blob = file.rename(tmp_path / "0123abcd")
    file.symlink_to(blob)
    folder = resolve_model(str(file))
    assert folder.name.startswith("tiny.Q8_0-")
    assert (folder / "model.gguf").readlink() == file
