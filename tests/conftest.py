"""What holds for all tests."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

# A shell starts background jobs with Ctrl-C ignored, and the programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_CHOOSES_GPU = re.compile(r"(?<!not )\bgpu\b")


def pytest_configure(config: pytest.Config) -> None:
    """Unless tests marked `gpu` are asked for on a machine that has one, nothing sees a GPU and Triton kernels are interpreted: the default
    tests mean the same everywhere. Both are read later, by torch at its first use of a GPU and by Triton when kernels are defined."""
    if _CHOOSES_GPU.search(config.option.markexpr) and _has_gpu():
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()
