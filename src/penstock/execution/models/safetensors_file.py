"""A safetensors file: its header, checked against the file itself before anything is read, and the bytes of its tensors.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON that map tensor
names to dtype, shape and [begin, end) within the rest of the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.parallel.shard_reading import read_pieces
from penstock.execution.parallel.sharding import WHOLE, Shard

# The types of plain weights, and those that quantised checkpoints keep codes, indices and scales in.
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGER_TYPES = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
FLOAT8_TYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}

# The format's own bound.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like. begin: its first byte, counted from data_start, the end of the header."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    data_start: int


def read_header(file: Path, *, codes: bool = False) -> dict[str, TensorInfo]:
    """The tensors of `file`. Raises ModelFormatError, naming the file, when header and file length do not agree.

    `codes`: tensors may hold integers and 8-bit floats as well.
    """
    types = FLOAT_TYPES | (INTEGER_TYPES | FLOAT8_TYPES if codes else {})
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
    _check_metadata(file, header.pop("__metadata__", {}))
    data_bytes = size - 8 - length
    tensors = {name: _tensor_info(file, name, entry, types, 8 + length) for name, entry in header.items()}
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


def read_tensor(info: TensorInfo, shard: Shard = WHOLE) -> Tensor:
    """The tensor, or a part of it, in memory of its own: nothing stays mapped, so that file pages never count as ours.

    Raises ModelFormatError when the file has become shorter since its header was read.
    """
    tensor = torch.empty(shard.shape(info.shape) if info.shape else (), dtype=info.dtype)
    row = info.nbytes // max(1, info.shape[0]) if info.shape else info.nbytes
    begin = info.data_start + info.begin + (0 if shard.rows is None else shard.rows[0] * row)
    columns = None if len(info.shape) < 2 else shard.columns
    if columns is None:
        target = tensor.view(-1).unsqueeze(0)
    else:
        target, begin = tensor, begin + columns[0] * (row // max(1, info.shape[1]))
    with info.file.open("rb", buffering=0) as stream:
        try:
            read_pieces(stream.fileno(), target, begin, row)
        except EOFError as error:
            raise ModelFormatError(f"{info.file} became shorter while it was read; get it again.") from error
    return tensor


def _check_metadata(file: Path, metadata: Any) -> None:
    """The format allows strings only."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFormatError(f"{file} is no safetensors file: its metadata must be an object of strings.")


def _tensor_info(file: Path, name: str, entry: Any, types: dict[str, torch.dtype], data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise ModelFormatError(f"{file}: the header entry of {name!r} is malformed.") from error
    if valid and dtype not in types:
        supported = ", ".join(types)
        raise ModelFormatError(
            f"{file}: tensor {name!r} has type {dtype!r}, which is not supported; supported: {supported}."
        )
    if not valid or begin > end or end - begin != math.prod(shape) * types[dtype].itemsize:
        raise ModelFormatError(f"{file}: the header entry of {name!r} is malformed.")
    return TensorInfo(file, types[dtype], shape, begin, end - begin, data_start)
