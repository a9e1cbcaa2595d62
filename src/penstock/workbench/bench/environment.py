"""What a figure was measured on: machine, versions, date. Everything is read without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil

PACKAGES = ("penstock", "torch", "numpy", "msgspec", "uvloop")


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The client's machine. `load_average`: the one-minute average before the run, so that a busy machine shows."""

    date: str
    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    versions: dict[str, str]
    load_average: float


def describe_environment() -> Environment:
    """The environment now."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={name: version for name in PACKAGES if (version := _version(name))},
        load_average=round(psutil.getloadavg()[0], 2),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
