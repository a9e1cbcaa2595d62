"""Downloads from a hub on loopback: what is chosen, resumed, refused, and what the folder looks like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError, ModelFormatError
from penstock.hub.api import HubClient, HubError
from penstock.hub.pull import pull
from penstock.hub.resolve import MANIFEST, Manifest, read_manifest, resolve_model
from tests.hub.fake_hub import FakeHub

NAME = "org/tiny"
WEIGHTS = os.urandom(3 * 2**20)
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
    "onnx/model.safetensors": b"elsewhere",
    "modeling_custom.py": b"raise SystemExit",
}


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PENSTOCK_MODELS", str(tmp_path / "models"))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.add(NAME, dict(FILES))
    server = hub.start()
    yield hub
    server.shutdown()
    server.server_close()


def pull_from(
    hub: FakeHub, destination: Path, *, name: str = NAME, revision: str | None = None, token: str | None = None
) -> Manifest:
    return pull(HubClient(hub.endpoint, token), name, destination, revision=revision, retry_wait_s=0.0)


def test_pulled_folder_is_plain_complete_and_recorded(hub: FakeHub, tmp_path: Path) -> None:
    destination = tmp_path / "tiny"
    manifest = pull_from(hub, destination)

    expected = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert {path.name for path in destination.iterdir()} == expected | {MANIFEST}
    assert not any(path.is_symlink() for path in destination.iterdir())
    assert (destination / "model.safetensors").read_bytes() == WEIGHTS
    assert manifest.commit == "c" * 40
    assert json.loads((destination / MANIFEST).read_text()) == {
        "name": NAME,
        "revision": "main",
        "commit": "c" * 40,
        "files": {name: len(FILES[name]) for name in expected},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_second_pull_downloads_nothing(hub: FakeHub, tmp_path: Path) -> None:
    pull_from(hub, tmp_path / "tiny")
    hub.requests.clear()
    pull_from(hub, tmp_path / "tiny")
    assert [url for url, _ in hub.requests if "/resolve/" in url] == []


def test_pinned_commit_that_is_here_needs_no_hub(hub: FakeHub, tmp_path: Path) -> None:
    pull_from(hub, tmp_path / "tiny", revision="c" * 40)
    client = HubClient("http://127.0.0.1:9", None)
    assert pull(client, NAME, tmp_path / "tiny", revision="c" * 40).commit == "c" * 40


def test_new_commit_replaces_the_old_folder(hub: FakeHub, tmp_path: Path) -> None:
    pull_from(hub, tmp_path / "tiny")
    hub.add(NAME, {**FILES, "model.safetensors": b"newer"}, commit="d" * 40)
    assert pull_from(hub, tmp_path / "tiny").commit == "d" * 40
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_index_chooses_the_shards(hub: FakeHub, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = {name: name.encode() for name in index["weight_map"].values()}
    hub.add(
        "org/sharded",
        {
            "config.json": b"{}",
            "model.safetensors.index.json": json.dumps(index).encode(),
            "x.safetensors": b"no",
            **shards,
        },
    )
    manifest = pull_from(hub, tmp_path / "sharded", name="org/sharded")
    assert set(manifest.files) == {"config.json", "model.safetensors.index.json", *shards}


def test_broken_connection_continues_where_it_was(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after["model.safetensors"] = [2**20, 2**20]
    pull_from(hub, tmp_path / "tiny")
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [headers.get("Range") for headers in hub.downloads("model.safetensors")]
    assert ranges == [None, f"bytes={2**20}-", f"bytes={2**21}-"]


def test_interrupted_pull_leaves_no_complete_looking_folder_and_resumes(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after["model.safetensors"] = [2**20, 0, 0, 0, 0, 0, 0]
    with pytest.raises(HubError, match="run the same command to continue"):
        pull_from(hub, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()

    hub.cut_after.clear()
    hub.requests.clear()
    pull_from(hub, tmp_path / "tiny")
    assert [headers.get("Range") for headers in hub.downloads("model.safetensors")] == [f"bytes={2**20}-"]
    assert hub.downloads("config.json") == []
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == WEIGHTS
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_damaged_file_is_refused_and_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.checksums["model.safetensors"] = "0" * 64
    with pytest.raises(HubError, match=r"model\.safetensors arrived damaged"):
        pull_from(hub, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
    hub.checksums.clear()
    pull_from(hub, tmp_path / "tiny")
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == WEIGHTS


def test_gated_model_without_and_with_a_token(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated[NAME] = "secret"
    with pytest.raises(HubError, match=r"is gated: accept its terms .* --token or HF_TOKEN"):
        pull_from(hub, tmp_path / "tiny")
    with pytest.raises(HubError, match="this token has no access"):
        pull_from(hub, tmp_path / "tiny", token="wrong")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert pull_from(hub, tmp_path / "tiny").name == NAME


def test_token_does_not_follow_a_redirect_to_another_host(hub: FakeHub, tmp_path: Path) -> None:
    storage = FakeHub()
    storage.add(NAME, dict(FILES))
    server = storage.start()
    hub.gated[NAME] = "secret"
    hub.redirect_to = storage.endpoint
    pull_from(hub, tmp_path / "tiny", token="secret")
    server.shutdown()
    server.server_close()
    assert hub.downloads("config.json")[0]["Authorization"] == "Bearer secret"
    assert all("Authorization" not in headers for _, headers in storage.requests)


def test_missing_repository_and_revision(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="There is no model org/none"):
        pull_from(hub, tmp_path / "none", name="org/none")
    with pytest.raises(HubError, match="no revision 'v9'"):
        pull_from(hub, tmp_path / "tiny", revision="v9")


def test_unreachable_hub(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"Cannot reach http://127\.0\.0\.1:9 "):
        pull(HubClient("http://127.0.0.1:9", None), NAME, tmp_path / "tiny")


def test_disk_too_small_is_told_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    hub.sizes["model.safetensors"] = 10**18
    with pytest.raises(ConfigError, match=r"needs 1000000000\.0 GB"):
        pull_from(hub, tmp_path / "tiny")
    assert hub.downloads("model.safetensors") == []


def test_repository_without_safetensors(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(ModelFormatError, match="no safetensors weights"):
        pull_from(hub, tmp_path / "pickle", name="org/pickle")


def test_foreign_folder_is_not_touched(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not a pulled org/tiny"):
        pull_from(hub, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["../etc", "a/b/c", "", "org/..", "-x/y"])
def test_names_that_are_no_hub_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a hub name"):
        pull(HubClient("http://127.0.0.1:9", None), name, tmp_path / "x")


def test_pulled_model_resolves_by_name_and_revision(hub: FakeHub, tmp_path: Path) -> None:
    root = tmp_path / "models"
    pull_from(hub, root / NAME)
    hub.add(NAME, {**FILES, "model.safetensors": b"v1"}, commit="d" * 40, revision="v1")
    pull_from(hub, root / f"{NAME}@v1", revision="v1")

    assert resolve_model(NAME) == root / NAME
    assert resolve_model(NAME, "v1") == root / f"{NAME}@v1"
    assert resolve_model(NAME, "d" * 40) == root / f"{NAME}@v1"
    with pytest.raises(ConfigError, match="penstock pull org/tiny --revision v2"):
        resolve_model(NAME, "v2")


def test_truncated_folder_does_not_count_as_pulled(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "models" / NAME
    pull_from(hub, folder)
    (folder / "model.safetensors").write_bytes(b"short")
    assert read_manifest(folder) is None
    with pytest.raises(ConfigError, match="Run `penstock pull org/tiny`"):
        resolve_model(NAME)
    pull_from(hub, folder)
    assert resolve_model(NAME) == folder
