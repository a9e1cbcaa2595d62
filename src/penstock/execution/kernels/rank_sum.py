"""Sums over the ranks of a group, called from C++ in the middle of a step (csrc/decoder.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# int32_t (*)(void* context, float* data, int64_t count): 0 when done.
_SUM_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@dataclass(frozen=True)
class RankSum:
    """A C function that replaces `count` floats by their sum over all ranks; see DecoderSpec.all_reduce.

    rank: this process's. function, context: addresses. failure: what to raise for its last answer, which was not 0. keep: what the
    addresses point to.
    """

    rank: int
    function: int
    context: int | None
    failure: Callable[[int], BaseException]
    keep: object


def callback_sum(rank: int, all_reduce: Callable[[Tensor], None]) -> RankSum:
    """A RankSum that calls Python: `all_reduce` gets the numbers as a tensor [count] and sums it in place; what it raises is the
    failure."""
    raised: list[BaseException] = []

    def run(_: int | None, data: int, count: int) -> int:
        raised.clear()
        try:
            memory = (ctypes.c_float * count).from_address(data)
            all_reduce(torch.from_numpy(np.ctypeslib.as_array(memory)))
        except BaseException as error:  # An exception must not leave a callback; the caller raises it again.
            raised.append(error)
            return 1
        return 0

    def failure(_: int) -> BaseException:
        return raised.pop() if raised else RuntimeError("a sum over ranks failed")

    function = _SUM_FUNCTION(run)
    return RankSum(rank, ctypes.cast(function, ctypes.c_void_p).value or 0, None, failure, function)
