"""What `penstock doctor` says of a GPU, with the facts of one that is not there."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from penstock.cli import checks
from penstock.execution.kernels.triton import support
from tests.execution.attention.package_doubles import FlashDouble, FlashInferDouble


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """No package for attention is installed beside it."""
    major, minor = capability
    properties = types.SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        checks, "_nvidia_smi", lambda field: {"name": ["NVIDIA H200"], "driver_version": ["580.65.06"]}[field]
    )
    for module in ("flash_attn", "flash_attn_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(support, "_reason", support._reason.__wrapped__)  # without what it remembers


@pytest.mark.usefixtures("h200")
def test_names_the_gpu_and_every_version() -> None:
    found = {check.name: check for check in checks.run_checks()}
    gpu = found["GPU"]
    assert gpu.status == "ok"
    assert gpu.value.startswith("NVIDIA H200 (140 GiB, compute capability 9.0); driver 580.65.06, CUDA 13.0, torch ")
    assert ", triton " in gpu.value
    assert found["GPU attention"].value == "our Triton kernels; neither FlashAttention nor FlashInfer is installed"


@pytest.mark.usefixtures("h200")
def test_names_the_packages_that_auto_would_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", FlashDouble(2).module)
    monkeypatch.setitem(sys.modules, "flashinfer", FlashInferDouble().module)
    assert checks.check_gpu_attention().value == (
        "our Triton kernels, or the fastest that fits the model at start; found flash-attn 2.8.3, flashinfer-python 0.6.1"
    )


def test_a_gpu_that_is_too_old_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    check = checks.check_gpu_attention()
    assert check.status == "note"
    assert "this GPU has compute capability 7.5; Triton kernels need 8.0" in check.value


def test_a_gpu_that_torch_cannot_use_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks, "_nvidia_smi", lambda field: ["NVIDIA H200"])
    check = checks.check_gpu()
    assert (check.status, check.value) == ("note", "NVIDIA H200, not usable")
    assert "install a CUDA build of torch" in check.fix


def test_without_a_gpu_nothing_is_said_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks, "_nvidia_smi", lambda field: [])
    found = {check.name: check for check in checks.run_checks()}
    assert found["GPU"].value == "none; the CPU is used"
    assert "GPU attention" not in found
