"""Collectives of processes on one machine, through memory that all of them have mapped (csrc/rank_memory.cpp)."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from penstock.execution.kernels.native import library, native_available
from penstock.execution.kernels.rank_sum import RankSum

# Where files are memory.
_FOLDER = Path("/dev/shm")  # noqa: S108
_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")

# What a rank brings in one round; longer tensors take several.
SLOT_BYTES = 512 * 1024

# Looks at another rank's counter before sleeping, some tens of microseconds.
_SPINS = 2000

# Seconds that a rank may take to come while its process lives.
PATIENCE_SECONDS = 600.0

# What csrc/rank_memory.cpp answers.
_FAILURES = {1: "another rank is gone", 2: "another rank did not come in time", 3: "this rank has left the others"}


@cache
def shared_memory_available() -> bool:
    """Whether this machine has what SharedMemoryCollectives need: Linux, and the library of native kernels."""
    return native_available() and _FOLDER.is_dir() and bool(library().penstock_group_supported())


class SharedMemoryCollectives:
    """Collectives over a file in memory; the same bits on every rank, whatever the tensor's length. Made by `join`.

    They raise RuntimeError within about 0.1 s after another rank's process has ended, and when a rank has not come in time. After an error
    the group cannot be used any more. Not thread-safe.
    """

    def __init__(self, handle: int, rank: int, size: int) -> None:
        self._handle: int | None = handle
        self._rank = rank
        self._size = size
        self._functions = library()

    @classmethod
    def join(
        cls,
        name: str,
        rank: int,
        size: int,
        *,
        barrier: Callable[[], object],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> SharedMemoryCollectives:
        """Join the group `name` (letters, digits and '-') as `rank` of `size`. All ranks do it at the same time, and `barrier` waits for
        all of them. No file remains. Raises RuntimeError when there is no such memory."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a group")
        file = _FOLDER / f"penstock-{name}"
        handle, error = None, 0
        try:
            if rank == 0:
                handle, error = _join(file, rank, size, patience_seconds)
            barrier()
            if rank > 0:
                handle, error = _join(file, rank, size, patience_seconds)
            barrier()
        finally:
            if rank == 0 and handle is not None:
                file.unlink(missing_ok=True)
        if handle is None:
            raise RuntimeError(
                f"rank {rank} of {size} cannot share memory with the others: {file}: {os.strerror(error)}"
            )
        return cls(handle, rank, size)

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            self._functions.penstock_group_destroy(handle)

    def leave(self) -> None:
        """Take part no more; the others find this rank gone."""
        self._functions.penstock_group_leave(self._handle)

    def all_reduce(self, tensor: Tensor) -> None:
        if tensor.dtype != torch.float32:
            parts = self._gathered(tensor)
            for part in parts[1:]:
                parts[0].add_(part)
            tensor.copy_(parts[0])
            return
        data = tensor.contiguous()
        self._check(self._functions.penstock_group_all_reduce(self._handle, data.data_ptr(), data.numel()))
        if data is not tensor:
            tensor.copy_(data)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._gathered(tensor).movedim(0, -2).flatten(-2)

    def rank_sum(self) -> RankSum:
        """The sum for the native decoder, which calls it without Python."""
        function = ctypes.cast(self._functions.penstock_group_all_reduce, ctypes.c_void_p).value or 0
        return RankSum(self._rank, function, self._handle, self._failure, self)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """[size, *tensor.shape]"""
        data = tensor.contiguous()
        parts = torch.empty((self._size, *data.shape), dtype=data.dtype)
        self._check(
            self._functions.penstock_group_all_gather(self._handle, data.data_ptr(), data.nbytes, parts.data_ptr())
        )
        return parts

    def _check(self, answer: int) -> None:
        if answer:
            raise self._failure(answer)

    def _failure(self, answer: int) -> RuntimeError:
        why = _FAILURES.get(answer, f"failed with {answer}")
        return RuntimeError(f"{why} (rank {self._rank} of the {self._size} ranks that share each layer)")


def _join(file: Path, rank: int, size: int, patience_seconds: float) -> tuple[int | None, int]:
    """A handle, or None and the system's error number."""
    native = library()
    address, count = ctypes.c_void_p, ctypes.c_int64
    native.penstock_group_join.restype = address
    native.penstock_group_join.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_int32,
        count,
        ctypes.c_int32,
        count,
        ctypes.POINTER(ctypes.c_int32),
    ]
    native.penstock_group_leave.argtypes = [address]
    native.penstock_group_destroy.argtypes = [address]
    native.penstock_group_all_reduce.argtypes = [address, address, count]
    native.penstock_group_all_gather.argtypes = [address, address, count, address]
    error = ctypes.c_int32()
    # Spinning while the rank that is waited for has no core would only keep it from coming.
    spins = _SPINS if (os.cpu_count() or 1) >= size else 0
    patience = int(patience_seconds * 1000)
    handle: int | None = native.penstock_group_join(
        os.fsencode(file), rank, size, SLOT_BYTES, spins, patience, ctypes.byref(error)
    )
    return handle, error.value
