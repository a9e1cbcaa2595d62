"""The header of a safetensors file, checked against the file itself before anything is mapped.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON that map tensor
names to dtype, shape and [begin, end) within the rest of the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.core.errors import ModelFormatError

# Bytes per element of the types that can be loaded.
DTYPE_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

# The format's own bound.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like. begin: its first byte, counted from the end of the header."""

    file: Path
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of `file`. Raises ModelFormatError, naming the file, when header and file length do not agree."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelFormatError(
                f"{file} is truncated or no safetensors file: its header does not fit into {size} bytes."
            )
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(f"{file} is no safetensors file: its header is not valid JSON.") from error
    if not isinstance(header, dict):
        raise ModelFormatError(f"{file} is no safetensors file: its header is no JSON object.")
    data_bytes = size - 8 - length
    tensors = {name: _tensor_info(file, name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if info.begin != end:
            raise ModelFormatError(f"{file}: tensor {name!r} does not begin where the one before it ends.")
        end += info.nbytes
    if end > data_bytes:
        raise ModelFormatError(f"{file} is truncated: {data_bytes} of {end} bytes of tensors are there; get it again.")
    if end < data_bytes:
        raise ModelFormatError(f"{file} has {data_bytes - end} bytes after its last tensor; get it again.")
    return tensors


def _tensor_info(file: Path, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise ModelFormatError(f"{file}: the header entry of {name!r} is malformed.") from error
    if valid and dtype not in DTYPE_SIZES:
        supported = ", ".join(DTYPE_SIZES)
        raise ModelFormatError(
            f"{file}: tensor {name!r} has type {dtype!r}, which is not supported; supported: {supported}."
        )
    if not valid or begin > end or end - begin != math.prod(shape) * DTYPE_SIZES[dtype]:
        raise ModelFormatError(f"{file}: the header entry of {name!r} is malformed.")
    return TensorInfo(file, shape, begin, end - begin)
