"""A CPU installation of torch comes without triton: everything that a CPU runs has to load and run without it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# What only a GPU runs, and only when triton was found.
GPU_ONLY = (
    "penstock.execution.kernels.triton.",
    "penstock.execution.attention.flash_attention",
    "penstock.execution.attention.flashinfer",
    "penstock.execution.attention.triton_paged",
    "penstock.execution.layers.gpu_",
    "penstock.execution.measurement.gpu_",
    "penstock.execution.runner.block_mover",
    "penstock.execution.runner.device_",
    "penstock.execution.runner.step_graphs",
    "penstock.execution.sampling.device_",
)

SCRIPT = """
import importlib, json, pkgutil, sys
sys.modules["triton"] = None  # as if it were not installed
report = {"tokens": {}, "blocked": [], "broken": {}}

import penstock.cli.app, penstock.execution, penstock.launch
from penstock import LLM, SamplingParams
from penstock.cli.checks import run_checks
from penstock.core.errors import ConfigError

for backend in ("auto", "torch"):
    with LLM("stories", dtype="float32", attention_backend=backend, kv_cache_gib=0.05, threads=1) as llm:
        (answer,) = llm.generate(["Once upon a time"], SamplingParams(temperature=0.0, max_tokens=8))
        report["tokens"][backend] = list(answer.outputs[0].token_ids)
try:
    LLM("stories", attention_backend="triton", kv_cache_gib=0.05, threads=1)
except ConfigError as error:
    report["refusal"] = str(error)
report["doctor"] = {check.name: check.status for check in run_checks()}

for module in pkgutil.walk_packages(penstock.execution.__path__, "penstock.execution."):
    if module.name.endswith(("__main__", "._native")):  # a program, and a library that is no Python module
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "triton":
            report["blocked"].append(module.name)
        else:
            report["broken"][module.name] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What a process without triton found."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_generates_on_a_cpu(report: dict[str, Any]) -> None:
    tokens = report["tokens"]
    assert len(tokens["auto"]) == 8
    assert tokens["auto"] == tokens["torch"]


def test_only_what_a_gpu_runs_imports_it(report: dict[str, Any]) -> None:
    assert report["broken"] == {}
    assert [name for name in report["blocked"] if not name.startswith(GPU_ONLY)] == []
    assert "penstock.execution.kernels.triton.rows" in report["blocked"]


def test_doctor_finds_a_machine_that_can_serve(report: dict[str, Any]) -> None:
    assert report["doctor"]["torch"] == "ok"
    assert "fail" not in report["doctor"].values()


def test_asking_for_triton_says_what_is_missing(report: dict[str, Any]) -> None:
    assert "the triton package is not installed" in report["refusal"]
