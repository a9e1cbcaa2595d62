"""Finding the library, and choosing the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.execution.kernels import native
from tests.execution.kernels.conftest import INSTRUCTION_SETS, usable_instruction_sets

PRINT_KERNELS = """
import torch
from penstock.execution.kernels import native
print(native.isa() if native.native_available() else native.unavailable_reason())
"""

# Each is a process of its own that imports torch: the first and the last always.
CHOICES = [
    name if index in (0, len(usable_instruction_sets()) - 1) else pytest.param(name, marks=pytest.mark.slow)
    for index, name in enumerate(usable_instruction_sets())
]


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")
@pytest.mark.parametrize("name", CHOICES)
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    assert run_python(PRINT_KERNELS, PENSTOCK_CPU_ISA=name).stdout.strip() == name


def test_every_instruction_set_was_tested() -> None:
    missing = [name for name in INSTRUCTION_SETS if name not in usable_instruction_sets()]
    if missing:
        pytest.skip(f"this machine or this build has no {', '.join(missing)}: their kernels were not run")


@pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")
def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run_python(PRINT_KERNELS, PENSTOCK_CPU_ISA="mmx")
    assert done.returncode == 1
    assert "PENSTOCK_CPU_ISA='mmx': this machine or this build has no such kernels; unset it." in done.stderr


def test_without_the_library_it_says_why(tmp_path: Path) -> None:
    assert run_python(PRINT_KERNELS, PENSTOCK_NATIVE="0").stdout.strip() == "PENSTOCK_NATIVE=0 is set"
    absent = run_python(PRINT_KERNELS, PENSTOCK_NATIVE="", PENSTOCK_NATIVE_LIBRARY=str(tmp_path / "none.so"))
    assert "were not built" in absent.stdout
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    assert (
        "cannot be loaded" in run_python(PRINT_KERNELS, PENSTOCK_NATIVE="", PENSTOCK_NATIVE_LIBRARY=str(broken)).stdout
    )


@pytest.mark.slow
@pytest.mark.skipif(not native.native_available(), reason="no native kernels in this installation")
def test_text_without_native_kernels_is_nearly_the_same() -> None:
    """The fallback serves the embedded model; in float32 its greedy text is that of the native kernels."""
    script = """
from penstock import LLM, SamplingParams
with LLM("stories", dtype="float32", kv_cache_gib=0.05) as llm:
    (answer,) = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=24))
    print(llm.model_info.attention_backend, answer.outputs[0].text)
"""
    with_native, without = run_python(script), run_python(script, PENSTOCK_NATIVE="0")
    backend, _, text = with_native.stdout.partition(" ")
    other_backend, _, other_text = without.stdout.partition(" ")
    assert (backend, other_backend) == ("native", "torch")
    assert text == other_text != ""
