"""What tests of native kernels share: they run once for each instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from penstock.execution.kernels import native

INSTRUCTION_SETS = ("portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")


def usable_instruction_sets() -> list[str]:
    """Those of this machine and this build; none without native kernels."""
    if not native.native_available():
        return []
    usual = native.isa()
    usable = [name for name in INSTRUCTION_SETS if native.library().penstock_choose_isa(name.encode())]
    native.library().penstock_choose_isa(usual.encode())
    return usable


def _parameters() -> list[Any]:
    absent = pytest.mark.skip(reason=f"no native kernels: {native.unavailable_reason()}")
    return list(usable_instruction_sets()) or [pytest.param("none", marks=absent)]


@pytest.fixture(params=_parameters())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the instruction set whose kernels run during the test."""
    name: str = request.param
    usual = native.isa()
    assert native.library().penstock_choose_isa(name.encode())
    yield name
    native.library().penstock_choose_isa(usual.encode())


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after a test that changes it."""
    usual = native.library().penstock_threads()
    yield
    native.set_threads(usual)
