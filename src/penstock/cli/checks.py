"""The checks of `penstock doctor`. Each is a function that returns what it found and never raises."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from penstock.cli.packages import EXTRAS, missing_modules
from penstock.core.errors import ConfigError
from penstock.hub.resolve import embedded_model_folder, models_folder

GIB = 2**30
MINIMUM_PYTHON = (3, 11)
# Below this a model of any use does not fit beside torch itself.
MINIMUM_MEMORY_BYTES = 1 * GIB
# Flags of /proc/cpuinfo that kernels look for, and what people call them.
CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "bf16",
    "amx_tile": "AMX",
    "asimd": "NEON",
    "i8mm": "I8MM",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. `status`: ok, note (works, could be better) or fail (serving cannot work)."""

    name: str
    status: Literal["ok", "note", "fail"]
    value: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def run_checks() -> list[Check]:
    """All checks, in the order of the report."""
    steps: list[Callable[[], Check]] = [
        check_python,
        check_torch,
        check_cpu,
        check_gpu,
        check_memory,
        check_disk,
        check_kernels,
        check_embedded_model,
    ]
    if _gpu_is_usable(_import_torch()):
        steps.insert(steps.index(check_gpu) + 1, check_gpu_attention)
    return [step() for step in steps] + [check_extra(extra) for extra in EXTRAS]


def check_python() -> Check:
    version = platform.python_version()
    if sys.version_info < MINIMUM_PYTHON:
        return Check("Python", "fail", version, "Install Python 3.11 or newer.")
    return Check("Python", "ok", f"{version} ({sys.executable})")


def check_torch() -> Check:
    torch = _import_torch()
    if torch is None:
        return Check("torch", "fail", "not installed or not loadable", "Run `make install`, or `pip install torch`.")
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return Check("torch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def check_cpu() -> Check:
    info = _read("/proc/cpuinfo")
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    flags = set()
    for line in info.splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            break
    features = [label for flag, label in CPU_FLAGS.items() if flag in flags]
    known = ", ".join(features) if features else "no vector units known"
    return Check("CPU", "ok", f"{model or platform.machine()}, {_usable_cores()} usable cores, {known}")


def check_gpu() -> Check:
    torch = _import_torch()
    driver = _nvidia_smi("name")
    if _gpu_is_usable(torch):
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        gpus = [
            f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor})"
            for gpu in found
        ]
        versions = [f"driver {version}" for version in _nvidia_smi("driver_version")[:1]]
        versions += [f"CUDA {torch.version.cuda}", f"torch {torch.__version__}", _installed_version("triton")]
        return Check("GPU", "ok", f"{', '.join(gpus)}; {', '.join(versions)}")
    if driver:
        fix = "This torch cannot use it: install a CUDA build of torch that fits the driver."
        return Check("GPU", "note", f"{', '.join(driver)}, not usable", fix)
    return Check("GPU", "ok", "none; the CPU is used")


def check_gpu_attention() -> Check:
    """Whose attention a GPU would run, and the packages that --attention-backend auto would look at. Only where there is a GPU."""
    import torch

    from penstock.execution.attention.packages import installed_packages
    from penstock.execution.kernels.triton.support import triton_runs_on, triton_unavailable_reason

    device = torch.device("cuda")
    if not triton_runs_on(device):
        value = f"torch operators, slow; no Triton kernels: {triton_unavailable_reason(device)}"
        return Check("GPU attention", "note", value, "Install triton (`pip install triton`), or use a newer GPU.")
    packages = installed_packages()
    if not packages:
        return Check("GPU attention", "ok", "our Triton kernels; neither FlashAttention nor FlashInfer is installed")
    value = f"our Triton kernels, or the fastest that fits the model at start; found {', '.join(map(str, packages))}"
    return Check("GPU attention", "ok", value)


def check_memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    limit = _cgroup_limit_bytes()
    available = min(memory.available, limit) if limit else memory.available
    text = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f} GiB"
    if limit and limit < memory.total:
        text += f", limited to {limit / GIB:.1f} GiB by the container"
    if available < MINIMUM_MEMORY_BYTES:
        return Check("Memory", "fail", text, "At least 1 GiB is needed; stop other programs or raise the limit.")
    return Check("Memory", "ok", text)


def check_disk() -> Check:
    folder = models_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / GIB:.1f} GiB free for models in {folder}"
    if free < 5 * GIB:
        return Check("Disk", "note", text, "`penstock pull --dir` or PENSTOCK_MODELS can name another disk.")
    return Check("Disk", "ok", text)


def check_kernels() -> Check:
    if _import_torch() is None:
        return Check("Kernels", "fail", "none without torch")
    import torch

    from penstock.execution.kernels.native import isa, native_available, unavailable_reason

    capability = torch.backends.cpu.get_cpu_capability()
    try:
        if native_available():
            return Check("Kernels", "ok", f"native, {isa()}; torch uses {capability}")
    except ConfigError as error:
        return Check("Kernels", "fail", "none", str(error))
    value = f"torch operators ({capability}); no native kernels: {unavailable_reason()}"
    return Check("Kernels", "note", value, "Install a C++ compiler (g++ or clang++) and run `pip install` again.")


def check_embedded_model() -> Check:
    try:
        folder = embedded_model_folder()
    except ConfigError as error:
        return Check("Embedded model", "note", "missing", str(error))
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Check("Embedded model", "ok", f"{size / 1e6:.1f} MB in {folder}")


def check_extra(extra: str) -> Check:
    """The packages of an extra. Serving cannot work without those of `server`."""
    purpose, modules = EXTRAS[extra]
    missing = missing_modules(modules)
    if not missing:
        return Check(f"Extra {extra}", "ok", ", ".join(_distribution(module) for module in modules))
    fix = f"{purpose}: run `pip install 'penstock[{extra}]'`."
    return Check(f"Extra {extra}", "fail" if extra == "server" else "note", f"missing: {', '.join(missing)}", fix)


def _distribution(module: str) -> str:
    names = importlib.metadata.packages_distributions().get(module, [module])
    return f"{names[0]} {importlib.metadata.version(names[0])}"


def _import_torch() -> Any:
    """torch, or None when it is not there or its libraries do not load (OSError)."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu_is_usable(torch: Any) -> bool:
    """torch: the module, or None."""
    if torch is None:
        return False
    with warnings.catch_warnings():
        # torch warns about drivers that it cannot use; the report says it in its own words.
        warnings.simplefilter("ignore")
        return bool(torch.cuda.is_available())


def _nvidia_smi(field: str) -> list[str]:
    """What the driver's own program says of each GPU; nothing without the program or a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.strip().splitlines() if result.returncode == 0 else []


def _installed_version(distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {distribution}"


def _cgroup_limit_bytes() -> int | None:
    """The container's memory limit (cgroup v2, then v1), None without one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path).strip()
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
