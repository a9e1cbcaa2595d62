"""From a model's name to its folder, and what a mistyped one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.hub import resolve_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "TinyLlama-1.1B-Chat"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def test_folder_resolves_to_itself(folder: Path) -> None:
    assert resolve_model("./TinyLlama-1.1B-Chat") == folder
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize("typed", ["./TinyLama-1.1B-Chat", "./TinyLlama-1.1B-chat"])
def test_mistyped_path_is_answered_with_the_close_one(folder: Path, typed: str) -> None:
    with pytest.raises(ConfigError, match=r"There is no folder .* Did you mean \./TinyLlama-1\.1B-Chat\?"):
        resolve_model(typed)


def test_mistyped_embedded_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean stories"):
        resolve_model("storys")


def test_folder_without_config_names_the_nested_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json; did you mean .*TinyLlama-1\.1B-Chat"):
        resolve_model(str(tmp_path))


def test_file_instead_of_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is a file; give a GGUF file, or the folder"):
        resolve_model(str(folder / "config.json"))


def test_hub_name_that_was_not_pulled(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Run `penstock pull org/model` first"):
        resolve_model("org/model")
