"""`penstock doctor`, `penstock verify` and the command around a download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from penstock.cli import checks, packages
from penstock.cli.checks import Check
from penstock.core.config import EngineConfig
from penstock.testing.checkpoints import write_tiny_checkpoint
from tests.cli.conftest import Invoke
from tests.hub.fake_hub import FakeHub


def test_doctor_reports_this_machine(invoke: Invoke) -> None:
    result = invoke("doctor")
    assert result.code == 0
    for name in ("Python", "torch", "CPU", "GPU", "Memory", "Disk", "Kernels", "Embedded model", "Extra server"):
        assert name in result.out
    assert "penstock serve can work here." in result.out


def test_doctor_as_json_names_what_is_missing(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packages.EXTRAS, "server", ("penstock serve", ("fastapi", "no_such_module")))
    monkeypatch.setitem(packages.EXTRAS, "verify", ("penstock verify", ("no_such_module",)))
    result = invoke("doctor", "--json")
    report = json.loads(result.out)
    assert result.code == 1
    assert report["can_serve"] is False
    found = {check["name"]: check for check in report["checks"]}
    assert found["Extra server"]["status"] == "fail"
    assert "pip install 'penstock[server]'" in found["Extra server"]["fix"]
    assert found["Extra verify"]["status"] == "note"


def test_doctor_without_torch_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_import_torch", lambda: None)
    found = {check.name: check for check in checks.run_checks()}
    assert found["torch"].status == "fail"
    assert found["Kernels"].status == "fail"


def test_doctor_counts_the_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_cgroup_limit_bytes", lambda: 512 * 2**20)
    check = checks.check_memory()
    assert isinstance(check, Check)
    assert check.status == "fail"
    assert "limited to 0.5 GiB by the container" in check.value


def test_missing_package_of_a_command_is_one_line(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "missing_modules", list)
    result = invoke("verify")
    assert result.code == 2
    assert "needs the package transformers; run `pip install 'penstock[verify]'`." in result.err


def test_verify_matches_transformers(invoke: Invoke, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "qwen3")
    result = invoke("verify", str(tmp_path), "--prompts", "3", "--tokens", "8", "--tolerance", "1e-4")
    assert "3 of 3 prompts match." in result.out
    assert result.code == 0


def test_verify_sees_a_difference(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours computes with one weight that the reference does not have."""
    reference, ours = tmp_path / "reference", tmp_path / "ours"
    for folder in (reference, ours):
        folder.mkdir()
        write_tiny_checkpoint(folder, "llama")
    weights = load_file(ours / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"] * -3
    save_file(weights, ours / "model.safetensors", metadata={"format": "pt"})

    from penstock.cli import comparison
    from penstock.execution.models.registry import LoadedModel, load_model

    def load_ours(
        config: EngineConfig, _folder: Path, device: torch.device, dtype: torch.dtype, progress: bool
    ) -> LoadedModel:
        return load_model(config, ours, device, dtype, progress)

    monkeypatch.setattr(comparison, "load_model", load_ours)
    result = invoke("verify", str(reference), "--prompts", "2", "--tokens", "8")
    assert result.code == 1
    assert "differs" in result.out


def test_pull_command_puts_the_model_where_serve_finds_it(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    hub.add("org/tiny", {"config.json": b"{}", "model.safetensors": b"weights"})
    server = hub.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    result = invoke("pull", "org/tiny")
    other = invoke("pull", "org/tiny", "--dir", str(tmp_path / "here"))
    missing = invoke("pull", "org/none")
    server.shutdown()
    server.server_close()
    assert result.code == other.code == 0
    assert "penstock serve org/tiny" in result.out
    assert (tmp_path / "models" / "org" / "tiny" / "penstock.json").is_file()
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == b"weights"
    assert missing.code == 1
    assert "There is no model org/none" in missing.err


def test_a_hub_name_that_is_not_here_is_pulled_when_it_is_used(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "source", "qwen2", tokenizer=True)
    hub = FakeHub()
    hub.add("org/tiny", {file.name: file.read_bytes() for file in folder.iterdir()})
    server = hub.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    first = invoke("verify", "org/tiny", "--prompts", "1", "--tokens", "2")
    downloads = len(hub.requests)
    second = invoke("verify", "org/tiny", "--prompts", "1", "--tokens", "2")
    server.shutdown()
    server.server_close()
    offline = invoke("serve", "org/other")
    assert first.code == second.code == 0
    assert "pulling it from the hub" in first.err
    assert downloads == len(hub.requests), "the second time it is here"
    assert offline.code == 2
    assert "Run `penstock pull org/other` first" in offline.err.splitlines()[-1]
