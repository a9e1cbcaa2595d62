"""Reads bfloat16 tensors of a safetensors file with numpy alone, which has no such type: as their bits, uint16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def read_bfloat16(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and bits of every tensor. Format: 8 bytes of header length, the header as JSON, the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{path}: tensor {name} is {entry['dtype']}, not BF16")
        first, end = entry["data_offsets"]
        yield name, data[first:end].view(np.uint16).reshape(entry["shape"])
