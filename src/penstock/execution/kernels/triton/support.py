"""Whether Triton kernels can run, and on what."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

# Ampere: the first with bfloat16 units and asynchronous copies.
_MINIMUM_CAPABILITY = 80
# What the interpreter pretends to be, so that launchers choose as they would on a GPU.
_INTERPRETED_CAPABILITY = 90
_INTERPRETED_MULTIPROCESSORS = 4


@dataclass(frozen=True)
class GPU:
    """What launchers need to know of a GPU. capability: 80 for compute capability 8.0 and so on."""

    capability: int
    num_multiprocessors: int

    @property
    def has_fp8(self) -> bool:
        """Units for, and conversions from, 8-bit floats."""
        return self.capability >= 89


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device."""
    return _reason(device.type) is None


def triton_unavailable_reason(device: torch.device) -> str:
    """Why they do not; '' when they do."""
    return _reason(device.type) or ""


@cache
def gpu(device: torch.device) -> GPU:
    """The GPU behind `device`; in the interpreter what stands for one."""
    if device.type != "cuda":
        return GPU(_INTERPRETED_CAPABILITY, _INTERPRETED_MULTIPROCESSORS)
    properties = torch.cuda.get_device_properties(device)
    return GPU(10 * properties.major + properties.minor, properties.multi_processor_count)


@cache
def _reason(device_type: str) -> str | None:
    if find_spec("triton") is None:
        return "the triton package is not installed (it comes with CUDA builds of torch)"
    if device_type == "cpu":
        return None if interpreted() else "Triton kernels run on a GPU only (or with TRITON_INTERPRET=1, slowly)"
    if torch.version.hip is not None:
        return "only NVIDIA GPUs are supported"
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < _MINIMUM_CAPABILITY:
        return f"this GPU has compute capability {major}.{minor}; Triton kernels need 8.0"
    return None
