"""Tokens and log-probabilities from logits in main memory, by csrc/sampling.h.

The twins are in execution/sampling/: torch_sampler.py (torch_tokens), masks.py (torch_forbid) and logprobs.py
(torch_token_logprobs). Requests' parameters lie in one numpy array with a record per slot, which the kernels read where it is.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.execution.kernels.native import library

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# TokenList in csrc/sampling_call.h.
TOKEN_LIST = np.dtype([("ids", np.uint64), ("values", np.uint64), ("count", np.int64)], align=True)
# SamplingSlot in csrc/sampling_call.h.
SAMPLING_SLOT = np.dtype(
    [
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("top_k", np.int64),
        ("key", np.int64),
        ("end_position", np.int64),
        ("used", TOKEN_LIST),
        ("biased", TOKEN_LIST),
        ("stops", TOKEN_LIST),
        ("temperature", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("repetition", np.float32),
        ("only_biased", np.int32),
        ("unused", np.int32),
    ],
    align=True,
)


class _SampleCall(ctypes.Structure):
    """SampleCall in csrc/sampling_call.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("slot_of_row", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("failed", ctypes.c_void_p),
    ]


class _MaskCall(ctypes.Structure):
    """MaskCall in csrc/sampling_call.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("logit_rows", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("mask_bytes", ctypes.c_int64),
    ]


class _LogprobCall(ctypes.Structure):
    """LogprobCall in csrc/sampling_call.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("logit_rows", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("num_top", ctypes.c_int64),
        ("logprobs", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("top_ids", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
    ]


def can_read(logits: Tensor) -> bool:
    """Whether the kernels take these logits as they lie in memory: float32 [M, V] on the CPU, rows without gaps."""
    return logits.dtype is torch.float32 and logits.device.type == "cpu" and logits.stride(1) == 1


def sample_tokens(
    logits: Tensor, records: npt.NDArray[np.void], slots: IntArray, positions: IntArray
) -> tuple[IntArray, BoolArray]:
    """A token for each row of logits, and which rows failed because they have no distribution (their token is 0).

    logits: float32 [M, V], see `can_read`; may be overwritten. records: SAMPLING_SLOT, all slots; slots, positions: int64 [M].
    """
    token_ids: IntArray = np.empty(len(slots), dtype=np.int64)
    failed: BoolArray = np.empty(len(slots), dtype=np.bool_)
    slots, positions = np.ascontiguousarray(slots), np.ascontiguousarray(positions)
    call = _SampleCall(
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[1],
        len(slots),
        records.ctypes.data,
        slots.ctypes.data,
        positions.ctypes.data,
        token_ids.ctypes.data,
        failed.ctypes.data,
    )
    _functions()[0](ctypes.byref(call))
    return token_ids, failed


def mask_logits(logits: Tensor, rows: IntArray, bits: npt.NDArray[np.uint8]) -> None:
    """Subtract infinity, in place, from the logits of tokens that are not allowed.

    logits: float32 [M, V], see `can_read`; rows: int64 [N], distinct; bits: uint8 [N, ceil(V / 8)], as in TokenMasks.
    """
    rows, bits = np.ascontiguousarray(rows), np.ascontiguousarray(bits)
    call = _MaskCall(
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[1],
        len(rows),
        rows.ctypes.data,
        bits.ctypes.data,
        bits.shape[1],
    )
    _functions()[2](ctypes.byref(call))


def find_logprobs(
    logits: Tensor, rows: IntArray | None, token_ids: IntArray, num_top: int
) -> tuple[npt.NDArray[np.float32], IntArray, IntArray, npt.NDArray[np.float32]]:
    """Log-probabilities float32 [M] and ranks int64 [M] of token_ids, int64 [M], and the `num_top` most likely tokens int64 [M, num_top]
    with their log-probabilities float32 [M, num_top].

    logits: float32 [R, V], see `can_read`; rows: int64 [M], the row of each token (None: the first M). num_top: at most V.
    """
    count = len(token_ids)
    token_ids = np.ascontiguousarray(token_ids)
    logprobs: npt.NDArray[np.float32] = np.empty(count, dtype=np.float32)
    ranks: IntArray = np.empty(count, dtype=np.int64)
    top_ids: IntArray = np.empty((count, num_top), dtype=np.int64)
    top_logprobs: npt.NDArray[np.float32] = np.empty((count, num_top), dtype=np.float32)
    call = _LogprobCall(
        logits.data_ptr(),
        None if rows is None else rows.ctypes.data,
        logits.stride(0),
        logits.shape[1],
        count,
        token_ids.ctypes.data,
        num_top,
        logprobs.ctypes.data,
        ranks.ctypes.data,
        top_ids.ctypes.data,
        top_logprobs.ctypes.data,
    )
    _functions()[1](ctypes.byref(call))
    return logprobs, ranks, top_ids, top_logprobs


@cache
def _functions() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    native = library()
    sample, logprobs, mask = native.penstock_sample, native.penstock_logprobs, native.penstock_mask_logits
    sample.argtypes, sample.restype = [ctypes.POINTER(_SampleCall)], None
    logprobs.argtypes, logprobs.restype = [ctypes.POINTER(_LogprobCall)], None
    mask.argtypes, mask.restype = [ctypes.POINTER(_MaskCall)], None
    return sample, logprobs, mask
