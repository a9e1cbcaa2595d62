"""Compiles Triton kernels ahead of time for a GPU that is not here, through the very launchers that would run them.

    with compile_only(GPUTarget capability 90) as compiled:
        rms_norm(torch.empty(4, 2048), ...)        # CPU tensors stand for device memory; nothing runs
    check_resources(compiled, capability=90)

Must run in a process where kernels are not interpreted (TRITON_INTERPRET unset when they are defined); `run_compile_only` starts one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from penstock.execution.kernels.triton import support

# Shared memory that one program may have, in bytes, and registers that a thread may have.
MAX_SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448}
MAX_REGISTERS = 255

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as the GPU would get it. stack_bytes: what a thread keeps in local memory, spilled registers above all."""

    name: str
    capability: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    ptx: str


class _AbsentGPU:
    """A driver for a GPU of which only the instruction set is known."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device: each capability is one of its own.
        return self._capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compile_only(capability: int, num_multiprocessors: int = 132) -> Iterator[list[CompiledKernel]]:
    """Inside, calls of Triton kernels compile for `capability` (80, 90) and run nothing. The list grows by one entry per call."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if support.interpreted():
        raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET before they are defined")
    compiled: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_instead(function: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = run(function, *arguments, grid=grid, warmup=True, **options)
        registers, stack_bytes = _resources(kernel.asm["cubin"])
        shared = kernel.metadata.shared
        compiled.append(
            CompiledKernel(function.__name__, capability, shared, registers, stack_bytes, kernel.asm["ptx"])
        )
        return kernel

    gpu = support.GPU(capability, num_multiprocessors)
    with (
        mock.patch.object(driver, "_active", _AbsentGPU(capability)),
        mock.patch.object(JITFunction, "run", compile_instead),
        mock.patch.object(support, "gpu", return_value=gpu),
    ):
        yield compiled


def check_resources(compiled: list[CompiledKernel], *, max_stack_bytes: int = 0) -> None:
    """Raise AssertionError, naming the kernel, when one does not fit the GPU or spills registers; also when there is none."""
    assert compiled, "nothing was compiled"
    for kernel in compiled:
        what = f"{kernel.name} for sm_{kernel.capability}"
        assert kernel.shared_bytes <= MAX_SHARED_BYTES[kernel.capability], f"{what}: {kernel.shared_bytes} B shared"
        assert kernel.registers <= MAX_REGISTERS, f"{what}: {kernel.registers} registers"
        assert kernel.stack_bytes <= max_stack_bytes, f"{what}: {kernel.stack_bytes} B of stack (spilled registers)"


def run_compile_only(module: str, *arguments: str, timeout_s: float = 110) -> None:
    """Run a module (`python -m`) in a process without the interpreter; raises AssertionError with its output when it fails. Compiled
    kernels are cached, by source and target, in Triton's own folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-m", module, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of the one kernel in `cubin`, as cuobjdump (which comes with Triton) reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout  # noqa: S603
    match = _RESOURCES.search(report)
    if match is None:
        raise RuntimeError(f"cuobjdump reported no resources: {report}")
    return int(match[1]), int(match[2])
