"""From a model's name to its folder, and what a mistyped one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.hub import resolve_model, resolve_models


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


def test_a_draft_model_is_resolved_like_a_model(folder: Path) -> None:
    config = EngineConfig(model="stories", speculative_model="./TinyLlama-1.1B-Chat", num_speculative_tokens=3)
    found, resolved = resolve_models(config)
    assert found == resolve_model("stories")
    assert (resolved.speculative_model, resolved.num_speculative_tokens) == (str(folder), 3)
    assert resolve_models(EngineConfig(speculative_model="ngram"))[1].speculative_model == "ngram"
    embedded = resolve_models(EngineConfig(speculative_model="stories-draft"))[1]
    assert Path(embedded.speculative_model) == resolve_model("stories-draft") != found
    with pytest.raises(ConfigError, match=r"--speculative-model: There is no folder \./nothing"):
        resolve_models(EngineConfig(speculative_model="./nothing"))
