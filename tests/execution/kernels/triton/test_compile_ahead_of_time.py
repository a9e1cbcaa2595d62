"""Every kernel compiles for GPUs that are not here, fits into their shared memory and spills no register."""

from __future__ import annotations

import pytest

from penstock.testing.triton_compile import run_compile_only

MODULE = "tests.execution.kernels.triton.compile_all"


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile(capability: str) -> None:
    run_compile_only(MODULE, capability)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_in_all_variants(capability: str) -> None:
    run_compile_only(MODULE, capability, "--everything", timeout_s=590)
