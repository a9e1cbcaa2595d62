"""The card's ceilings, measured first in every call of the script, and the machine that they belong to."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.gpu.case import NO_GPU, Case, Context, Machine, Plan
from benchmarks.gpu.records import Record, as_json

from penstock.workbench.bench.environment import describe_environment
from penstock.workbench.bench.report import markdown_table

TITLE = "Ceilings"
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "flashinfer-python", "flash-attn")


def cases(plan: Plan) -> list[Case]:
    return [Case("ceilings", "card", "ceilings", 15.0, _measure)]


def _measure(context: Context) -> dict[str, Any]:
    from penstock.execution.measurement.gpu_ceilings import measure_gpu_ceilings

    started = time.perf_counter()
    ceilings = measure_gpu_ceilings(context.plan.torch_device())
    return {
        "machine": as_json(describe_machine(context.plan)),
        "ceilings": asdict(ceilings),
        "seconds": round(time.perf_counter() - started, 2),
    }


def describe_machine(plan: Plan) -> Machine:
    """The GPU of this process and what drives it."""
    import torch

    environment = describe_environment()
    gpu, memory, multiprocessors = NO_GPU, 0.0, 0
    if not plan.tiny:
        properties = torch.cuda.get_device_properties(plan.torch_device())
        gpu, memory, multiprocessors = (
            properties.name,
            properties.total_memory / 2**30,
            properties.multi_processor_count,
        )
    return Machine(
        gpu=gpu,
        driver=_driver(),
        cuda=torch.version.cuda or "",
        memory_gib=round(memory, 1),
        multiprocessors=multiprocessors,
        cpu=environment.cpu,
        cores=environment.cores,
        python=platform.python_version(),
        versions={name: found for name in PACKAGES if (found := _version(name))},
    )


def line(data: dict[str, Any], record: Record) -> str:
    figures = data["ceilings"]
    float8 = "" if figures["float8"] is None else f", fp8 {figures['float8'] / 1e12:,.0f}"
    return (
        f"copy {figures['copy_bytes'] / 1e12:.2f} TB/s, read {figures['read_bytes'] / 1e12:.2f} TB/s, "
        f"bf16 {figures['bfloat16'] / 1e12:,.0f}{float8} TFLOP/s"
    )


def report(records: Sequence[Record]) -> list[str]:
    head = ["call", "copy TB/s (read + written)", "read TB/s", "bf16 TFLOP/s", "fp16", "fp8"]
    head += ["to GPU GB/s", "to host GB/s", "launch µs", "launch in a graph µs"]
    rows = [head]
    for record in records:
        figures = (record.data or {}).get("ceilings")
        if figures:
            rows.append([record.call, *_cells(figures)])
    text = (
        "Every other table gives shares of the ceilings of its own call. Products of two random 8,192 × 8,192 matrices; pinned host "
        "memory."
    )
    return [text, "", markdown_table(rows)]


def _cells(figures: dict[str, float | None]) -> list[str]:
    units = {"copy_bytes": 1e12, "read_bytes": 1e12, "bfloat16": 1e12, "float16": 1e12, "float8": 1e12}
    units |= {"to_device_bytes": 1e9, "to_host_bytes": 1e9, "launch_s": 1e-6, "graph_launch_s": 1e-6}
    return ["–" if (value := figures[name]) is None else f"{value / unit:,.3g}" for name, unit in units.items()]


def _driver() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().partition("\n")[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
