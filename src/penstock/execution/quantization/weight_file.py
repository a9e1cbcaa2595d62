"""The file in which packed weights are kept: safetensors, with every tensor at a multiple of 64 bytes, read by mapping it.

Gaps between tensors are filled with tensors called `padding.N`, because the format allows no holes. The metadata's `description` says for
each module which tensors make up its segments, `key` what the weights were made from, and `checksum` is the sha256 of everything else in
the header; that and the file's length are checked before a weight is used.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from penstock.execution.kernels.linear import PackedWeight

# Raised whenever the layout of PackedWeight's tensors or of this file changes.
LAYOUT_VERSION = 1

_ALIGNMENT = 64
_MAX_HEADER_BYTES = 64 * 2**20
_TENSORS = ("data", "scales", "offsets", "input_order", "bias")
_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class WeightFileError(Exception):
    """A file of packed weights that cannot be used; the message says why and names it."""


def write_weights(stream: BinaryIO, key: str, weights: Mapping[str, Sequence[PackedWeight]]) -> None:
    """Write all segments of all modules. Raises OSError."""
    entries: dict[str, Any] = {}
    pieces: list[Tensor | int] = []
    description: dict[str, list[dict[str, Any]]] = {}
    position = 0
    for module, segments in weights.items():
        description[module] = []
        for number, segment in enumerate(segments):
            described: dict[str, Any] = {
                "kind": segment.kind,
                "out_features": segment.out_features,
                "in_features": segment.in_features,
                "group_size": segment.group_size,
            }
            for part in _TENSORS:
                tensor: Tensor | None = getattr(segment, part)
                if tensor is None:
                    continue
                name = described[part] = f"{module}.{number}.{part}"
                entries[name] = _entry(tensor, position)
                pieces.append(tensor)
                position += tensor.nbytes
                if gap := -position % _ALIGNMENT:
                    entries[f"padding.{len(entries)}"] = {
                        "dtype": "U8",
                        "shape": [gap],
                        "data_offsets": [position, position + gap],
                    }
                    pieces.append(gap)
                    position += gap
            description[module].append(described)
    metadata = {"key": key, "layout": str(LAYOUT_VERSION), "description": json.dumps(description)}
    metadata["checksum"] = _checksum(entries, metadata)
    header = json.dumps({"__metadata__": metadata} | entries).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    stream.write(len(header).to_bytes(8, "little") + header)
    for piece in pieces:
        stream.write(bytes(piece) if isinstance(piece, int) else _bytes_of(piece))


def map_weights(file: Path, key: str) -> dict[str, tuple[PackedWeight, ...]]:
    """Module → segments, whose tensors lie in the mapped file. Raises WeightFileError when it is not what `write_weights` wrote for
    `key`, and OSError."""
    with file.open("rb") as stream:
        size = file.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise WeightFileError(f"{file} is truncated or something else")
        entries, metadata = _header(file, stream.read(length), key)
        if max((entry["data_offsets"][1] for entry in entries.values()), default=0) != size - 8 - length:
            raise WeightFileError(f"{file} is truncated or longer than it should be")
        # Private: writing to the tensors, which nobody does, would not reach the file.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.madvise(mmap.MADV_WILLNEED)

    def tensor(name: str | None) -> Tensor | None:
        if name is None:
            return None
        entry = entries[name]
        start, end = entry["data_offsets"]
        data = torch.frombuffer(mapped, dtype=torch.uint8, offset=8 + length + start, count=end - start)
        return data.view(_TYPES[entry["dtype"]]).view(entry["shape"])

    description = json.loads(metadata["description"])
    return {module: tuple(_segment(part, tensor) for part in parts) for module, parts in description.items()}


def _segment(described: Mapping[str, Any], tensor: Any) -> PackedWeight:
    return PackedWeight(
        kind=described["kind"],
        out_features=described["out_features"],
        in_features=described["in_features"],
        group_size=described["group_size"],
        **{part: tensor(described.get(part)) for part in _TENSORS},
    )


def _header(file: Path, content: bytes, key: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Entries and metadata. The checksum covers both, so that nothing needs to be checked after it."""
    try:
        entries: dict[str, Any] = json.loads(content)
        metadata: dict[str, str] = entries.pop("__metadata__")
        stored = metadata.pop("checksum")
        known = metadata["layout"] == str(LAYOUT_VERSION) and metadata["key"] == key
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightFileError(f"{file} holds no packed weights") from error
    if stored != _checksum(entries, metadata):
        raise WeightFileError(f"{file} is damaged: its header does not have its checksum")
    if not known:
        raise WeightFileError(f"{file} was made from something else")
    return entries, metadata


def _entry(tensor: Tensor, position: int) -> dict[str, Any]:
    return {
        "dtype": _TYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [position, position + tensor.nbytes],
    }


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _checksum(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([entries, metadata], sort_keys=True).encode()).hexdigest()
