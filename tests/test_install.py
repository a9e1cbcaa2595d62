"""tools/install.py: which torch it chooses and what it says, with a stand-in for pip."""

from __future__ import annotations

import importlib.util
import json
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("penstock_install", ROOT / "tools" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Pip:
    """An interpreter whose `-m pip install` writes prepared reports and records its calls."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = folder / "calls"
        self.python = str(folder / "python")
        self.default: list[dict[str, Any]] = []
        self.cpu: list[dict[str, Any]] | None = None

    def package(self, name: str, version: str, size: int) -> dict[str, Any]:
        wheel = self._folder / f"{name}-{version}.whl"
        wheel.write_bytes(b"x" * size)
        return {"metadata": {"name": name, "version": version}, "download_info": {"url": wheel.as_uri()}}

    def prepare(self) -> str:
        (self._folder / "default.json").write_text(json.dumps({"install": self.default}))
        if self.cpu is not None:
            (self._folder / "cpu.json").write_text(json.dumps({"install": self.cpu}))
        script = f"""#!/bin/bash
            echo "$*" >> {self._calls}
            report=default.json
            for argument in "$@"; do [ "$argument" = --extra-index-url ] && report=cpu.json; done
            while [ $# -gt 0 ]; do
                if [ "$1" = --report ]; then
                    [ -f {self._folder}/$report ] || {{ echo "ERROR: no route to host" >&2; exit 1; }}
                    cp {self._folder}/$report "$2"
                fi
                shift
            done
        """
        Path(self.python).write_text(script)
        Path(self.python).chmod(Path(self.python).stat().st_mode | stat.S_IXUSR)
        return self.python

    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()


@pytest.fixture
def pip(tmp_path: Path) -> Pip:
    pip = Pip(tmp_path)
    pip.default = [
        pip.package("torch", "2.13.0", 900_000),
        pip.package("nvidia-cublas", "13.0", 2_000_000),
        pip.package("numpy", "2.4.0", 100_000),
    ]
    pip.cpu = [pip.package("torch", "2.13.0+cpu", 200_000), pip.package("numpy", "2.4.0", 100_000)]
    return pip


def test_cpu_build_on_a_machine_without_gpu(
    install: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "find_gpu", lambda: None)
    install.install(pip.prepare(), "server")
    out = capsys.readouterr().out
    assert "no NVIDIA GPU found" in out
    assert "torch 2.13.0+cpu, CPU build" in out
    assert "2 packages to get, 0 MB" in out
    last = pip.calls()[-1]
    assert "--dry-run" not in last
    assert "torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu" in last
    assert f"-e {ROOT}[server] -c {ROOT}/constraints.txt" in last


def test_cuda_build_on_a_machine_with_a_gpu(
    install: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "find_gpu", lambda: "NVIDIA H200")
    install.install(pip.prepare(), "server")
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out
    assert "torch 2.13.0, CUDA build" in out
    assert "3 packages to get, 3 MB" in out
    assert "--extra-index-url" not in pip.calls()[-1]


def test_unreachable_cpu_index_is_told_and_the_cuda_build_taken(
    install: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip.cpu = None
    monkeypatch.setattr(install, "find_gpu", lambda: None)
    install.install(pip.prepare(), "server")
    out = capsys.readouterr().out
    assert "CPU build cannot be had from https://download.pytorch.org/whl/cpu" in out
    assert "no route to host" in out
    assert "torch 2.13.0, CUDA build" in out
    assert "3 packages to get, 3 MB" in out


def test_plain_torch_that_is_a_cpu_build_needs_no_other_index(
    install: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pip.cpu is not None
    pip.default = pip.cpu
    pip.cpu = None
    monkeypatch.setattr(install, "find_gpu", lambda: None)
    install.install(pip.prepare(), "server")
    assert "torch 2.13.0+cpu, CPU build" in capsys.readouterr().out
    assert len(pip.calls()) == 2


def test_old_python_and_missing_venv_module_are_one_line(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(install.InstallError, match=r"sudo apt install python3\.\d+-venv"):
        install.check_venv_module()
    monkeypatch.setattr(install, "MINIMUM_PYTHON", (3, 99))
    with pytest.raises(install.InstallError, match=r"Python 3\.11 or newer is needed"):
        install.check_python()


def test_needs_only_the_standard_library() -> None:
    code = "import sys; sys.argv = ['install.py', '--help']; import runpy; runpy.run_path('tools/install.py', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "--extras" in result.stdout


def test_makefile_targets_are_listed_by_make_help() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for target in ("install", "serve", "test", "test-all", "system-deps", "lint", "format", "docs"):
        assert f"make {target} " in result.stdout
