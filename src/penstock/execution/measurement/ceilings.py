"""The machine's ceilings: bytes per second read from memory, products per second in registers (csrc/ceilings.cpp).

Without native kernels torch's operators stand in: a sum over a large tensor, and a matrix product of float32.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock.execution.kernels import native

READ_BYTES = 1 << 30
# Each figure is the best of this many attempts: a ceiling is what the machine can do, and another process only takes from it.
ATTEMPTS = 8
MULTIPLY_TILES = 64
ATTEMPT_S = 0.06
SHORT_ITERATIONS = 1000
FLOAT32, INT8, BFLOAT16 = 0, 1, 2
MATRIX = 1536


@dataclass(frozen=True)
class Ceilings:
    """Per second, on `threads` threads: bytes read, operations of float32, of u8 * s8 and of bfloat16 (None: the processor has no
    instructions for them). A multiplication and an addition are two operations. `instructions`: what the arithmetic was measured with.
    """

    threads: int
    read_bytes: float
    float32: float
    int8: float | None
    bfloat16: float | None
    instructions: dict[str, str]


def higher_of(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher of each figure: what another process takes while one is measured is no property of the machine."""
    return Ceilings(
        threads=first.threads,
        read_bytes=max(first.read_bytes, second.read_bytes),
        float32=max(first.float32, second.float32),
        int8=max(first.int8 or 0.0, second.int8 or 0.0) or None,
        bfloat16=max(first.bfloat16 or 0.0, second.bfloat16 or 0.0) or None,
        instructions=first.instructions,
    )


def measure_ceilings(threads: int) -> Ceilings:
    """Takes about two seconds. The number of threads is as before afterwards."""
    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    before = torch.get_num_threads()
    native.set_threads(threads)
    try:
        return _measure_native(threads, memory) if native.native_available() else _measure_torch(threads, memory)
    finally:
        native.set_threads(before)


def _measure_native(threads: int, memory: torch.Tensor) -> Ceilings:
    library = native.library()
    library.penstock_ceiling_name.restype = ctypes.c_char_p
    library.penstock_ceiling_multiply.restype = ctypes.c_int64
    library.penstock_ceiling_multiply.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64]
    library.penstock_ceiling_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]

    def multiply(arithmetic: int) -> float:
        iterations = SHORT_ITERATIONS

        def attempt() -> int:
            done: int = library.penstock_ceiling_multiply(arithmetic, MULTIPLY_TILES, iterations)
            return done

        # Doubled until an attempt is long: where two threads begin on one core, the system takes some milliseconds to part them.
        seconds = 0.0
        while seconds < ATTEMPT_S:
            iterations *= 2
            started = time.perf_counter()
            if not attempt():
                return 0.0
            seconds = time.perf_counter() - started
        return _best(attempt)

    def read() -> int:
        library.penstock_ceiling_read(memory.data_ptr(), memory.nbytes)
        return memory.nbytes

    names = {"float32": FLOAT32, "int8": INT8, "bfloat16": BFLOAT16}
    used = {name: library.penstock_ceiling_name(code).decode() for name, code in names.items()}
    return Ceilings(
        threads=threads,
        read_bytes=_best(read),
        float32=multiply(FLOAT32),
        int8=multiply(INT8) or None,
        bfloat16=multiply(BFLOAT16) or None,
        instructions={name: instructions for name, instructions in used.items() if instructions},
    )


def _measure_torch(threads: int, memory: torch.Tensor) -> Ceilings:
    words = memory.view(torch.int64)
    matrix = torch.ones(MATRIX, MATRIX)

    def read() -> int:
        words.sum()
        return memory.nbytes

    def multiply() -> int:
        torch.mm(matrix, matrix)
        return 2 * MATRIX**3

    return Ceilings(threads, _best(read), _best(multiply), None, None, {"float32": "torch.mm"})


def _best(attempt: Callable[[], int]) -> float:
    """Amount per second in the best of several attempts; `attempt` returns the amount."""
    rates = []
    for _ in range(ATTEMPTS):
        started = time.perf_counter()
        amount = attempt()
        rates.append(amount / (time.perf_counter() - started))
    return max(rates)
