"""The library of native CPU kernels: found, checked and bound to torch's threads when it is first asked for.

Its C interface is csrc/abi.h; the structures there are mirrored by the modules beside this one. Without the library (no compiler at
installation, another platform) everything runs on torch's operators.

Environment: PENSTOCK_NATIVE=0 does without it. PENSTOCK_CPU_ISA=avx2 (avx_vnni, avx512, avx512_vnni, avx512_bf16, amx, portable) takes
the kernels of one instruction set instead of the processor's best. PENSTOCK_NATIVE_LIBRARY=FILE takes another build of the library.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from penstock.core.errors import ConfigError

# Equal to PENSTOCK_ABI_VERSION in csrc/abi.h.
ABI_VERSION = 2

_LIBRARY = Path(os.environ.get("PENSTOCK_NATIVE_LIBRARY") or Path(__file__).with_name("_native.so"))


@dataclass(frozen=True)
class _Loaded:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str | None


def native_available() -> bool:
    """Whether native kernels can be used. Raises ConfigError when PENSTOCK_CPU_ISA names none of this machine's."""
    return _load().library is not None


def unavailable_reason() -> str | None:
    """Why there are no native kernels, in one clause; None when there are."""
    return _load().reason


def library() -> ctypes.CDLL:
    """The loaded library. Raises ConfigError when there is none; ask `native_available` first."""
    loaded = _load()
    if loaded.library is None:
        raise ConfigError(f"There are no native CPU kernels: {loaded.reason}.")
    return loaded.library


def isa() -> str:
    """The instruction set whose kernels run."""
    name: bytes = library().penstock_isa()
    return name.decode()


def set_threads(count: int) -> None:
    """Threads of native kernels and of torch's operators: they are the same ones."""
    torch.set_num_threads(count if _openmp_runtime() is not None or not native_available() else 1)
    if native_available():
        library().penstock_set_threads(count)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's first element, for a structure's pointer; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


@cache
def _load() -> _Loaded:
    if os.environ.get("PENSTOCK_NATIVE") == "0":
        return _Loaded(None, "PENSTOCK_NATIVE=0 is set")
    if not _LIBRARY.is_file():
        return _Loaded(None, "they were not built (no C++ compiler at installation)")
    try:
        loaded = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return _Loaded(None, f"the library cannot be loaded ({error})")
    loaded.penstock_abi_version.restype = ctypes.c_int32
    if loaded.penstock_abi_version() != ABI_VERSION:
        return _Loaded(None, "the library belongs to another version of Penstock; install again")
    loaded.penstock_isa.restype = ctypes.c_char_p
    loaded.penstock_set_runtime.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    wanted = os.environ.get("PENSTOCK_CPU_ISA")
    if not loaded.penstock_choose_isa(wanted.encode() if wanted else None):
        raise ConfigError(f"PENSTOCK_CPU_ISA={wanted!r}: this machine or this build has no such kernels; unset it.")
    runtime = _openmp_runtime()
    if runtime is not None:
        loaded.penstock_set_runtime(
            ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p),
            ctypes.cast(runtime.omp_get_num_threads, ctypes.c_void_p),
        )
    loaded.penstock_set_threads(torch.get_num_threads() if runtime is not None else 1)
    return _Loaded(loaded, None)


@cache
def _openmp_runtime() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded (a second one would be a second pool of threads), if it can be entered from here."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if len(line.split()) > 5}
    for path in sorted(path for path in paths if "omp" in Path(path).name and ".so" in path):
        runtime = ctypes.CDLL(path)
        if hasattr(runtime, "GOMP_parallel") and hasattr(runtime, "omp_get_num_threads"):
            return runtime
    return None
