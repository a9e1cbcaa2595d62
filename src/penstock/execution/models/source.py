"""Where the numbers of a model come from: one interface over checkpoint formats, and the sources that read plain safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.execution.kernels.quantized import StoredWeight
from penstock.execution.models.fields import Fields
from penstock.execution.models.safetensors_file import TensorInfo, read_header, read_tensor
from penstock.execution.parallel.sharding import WHOLE, Shard
from penstock.execution.quantization.part import read_part
from penstock.execution.quantization.registry import (
    CheckpointFormat,
    CheckpointQuantization,
    WeightLayout,
    checkpoint_format,
    holds_codes,
)

GGUF_FILE = "model.gguf"
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class WeightSource(Protocol):
    """Where a model's numbers come from, under the names that a Hugging Face checkpoint of the architecture has."""

    def names(self) -> Sequence[str]:
        """For example 'model.layers.0.mlp.up_proj.weight' or 'model.norm.weight', in the order in which reading is fastest."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape: [N, K] for a linear weight however it is stored."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes that reading it takes from disk, for a progress bar."""
        ...

    def where(self, name: str) -> str:
        """'FILE: tensor NAME', for error messages."""
        ...

    def read(self, name: str, shard: Shard = WHOLE) -> StoredWeight:
        """A float tensor as it is stored (float32, float16 or bfloat16), or the canonical form of one in fewer bits.

        Of a shard, of which as little besides is read as the format allows, the numbers are those of the whole tensor; they are float32
        where no canonical form holds just them.
        """
        ...


@runtime_checkable
class RowSource(Protocol):
    """A WeightSource that can give a part of a tensor, so that a large one is never in memory as a whole."""

    def read_rows(self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> Tensor:
        """Rows [start, stop) of a float tensor, as it is stored, and of them the columns [start, stop); None: all."""
        ...


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`: those of the index file, or the one and only. Raises ModelFormatError."""
    if (folder / _INDEX_FILE).is_file():
        return sorted({folder / name for name in _weight_map(folder).values()})
    if (folder / _SINGLE_FILE).is_file():
        return [folder / _SINGLE_FILE]
    if found := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES):
        raise ModelFormatError(
            f"{folder} has weights only as {found[0]}; that format can run code when it is opened. "
            "Convert the model to safetensors (transformers: save_pretrained) or get it in that format."
        )
    raise ModelFormatError(f"{folder} has no weights: neither {_SINGLE_FILE} nor {_INDEX_FILE} exists.")


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that hold the weights of `folder`, whatever their format. Raises ModelFormatError."""
    return [folder / GGUF_FILE] if (folder / GGUF_FILE).is_file() else weight_files(folder)


class SafetensorsSource:
    """The tensors of one or more safetensors files, as they are stored.

    `codes`: tensors may hold integers and 8-bit floats, as in quantised checkpoints. Raises ModelFormatError for broken files and for a
    tensor that is in two of them.
    """

    def __init__(self, files: Sequence[Path], *, codes: bool = False) -> None:
        self._tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_header(file, codes=codes).items():
                if name in self._tensors:
                    raise ModelFormatError(f"{file}: tensor {name!r} is in {self._tensors[name].file.name} as well.")
                self._tensors[name] = info

    def names(self) -> Sequence[str]:
        """File by file, in the order of the bytes."""
        return sorted(self._tensors, key=lambda name: (self._tensors[name].file, self._tensors[name].begin))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The type that the tensor is stored in."""
        return self._tensors[name].dtype

    def nbytes(self, name: str) -> int:
        return self._tensors[name].nbytes

    def where(self, name: str) -> str:
        return f"{self._tensors[name].file}: tensor {name!r}"

    def read(self, name: str, shard: Shard = WHOLE) -> Tensor:
        return self.read_as(name, self._tensors[name].shape, shard)

    def read_as(self, name: str, shape: tuple[int, ...], shard: Shard) -> Tensor:
        """The shard of the tensor, seen as one of `shape` with as many numbers."""
        return _at_most_float32(read_tensor(replace(self._tensors[name], shape=shape), shard))

    def read_rows(self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> Tensor:
        return self.read(name, Shard((start, stop), columns))


def _at_most_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor → file name, from the index file; the files are in `folder` itself and exist."""
    index = Fields.from_file(folder / _INDEX_FILE)
    weight_map = index.string_map("weight_map")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            index.fail("weight_map", f"{name!r} is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise ModelFormatError(f"{folder / name} does not exist, but {_INDEX_FILE} lists it; download it again.")
    return weight_map


class _ModuleParts:
    """The tensors of one quantised module, as its format reads them."""

    def __init__(self, source: SafetensorsSource, module: str, names: dict[str, str]) -> None:
        self._source = source
        self._module = module
        self.names = names

    def __contains__(self, part: str) -> bool:
        return part in self.names

    def shape(self, part: str) -> tuple[int, ...]:
        return self._source.shape(self._name(part))

    def dtype(self, part: str) -> torch.dtype:
        return self._source.dtype(self._name(part))

    def read(self, part: str) -> Tensor:
        return self._source.read(self._name(part))

    def read_piece(self, part: str, shape: tuple[int, ...], shard: Shard) -> Tensor:
        return self._source.read_as(self._name(part), shape, shard)

    def _name(self, part: str) -> str:
        if part not in self.names:
            raise ModelFormatError(f"{self._module}.{part} is missing.")
        return self.names[part]


class QuantizedSource:
    """A quantised checkpoint in safetensors files: modules with codes are read in `form`, everything else as it is stored.

    Raises ModelFormatError for weights whose parts are missing or contradict each other.
    """

    def __init__(self, source: SafetensorsSource, form: CheckpointFormat) -> None:
        self._source = source
        self._format = form
        self._parts: dict[str, _ModuleParts] = {}
        self._order: list[str] = []
        self._collect()
        self._layouts = {name: self._layout(name) for name in self._parts}

    def names(self) -> Sequence[str]:
        """In the order of the bytes of codes and plain tensors."""
        return self._order

    def shape(self, name: str) -> tuple[int, ...]:
        layout = self._layouts.get(name)
        return self._source.shape(name) if layout is None else (layout.rows, layout.columns)

    def nbytes(self, name: str) -> int:
        if name not in self._parts:
            return self._source.nbytes(name)
        return sum(self._source.nbytes(part) for part in self._parts[name].names.values())

    def where(self, name: str) -> str:
        if name not in self._parts:
            return self._source.where(name)
        return self._source.where(next(iter(self._parts[name].names.values())))

    def read(self, name: str, shard: Shard = WHOLE) -> StoredWeight:
        if name not in self._parts:
            return self._source.read(name, shard)
        parts, layout = self._parts[name], self._layouts[name]
        try:
            if shard != WHOLE:
                return read_part(self._format, parts, layout, shard, self.where(name))
            return self._format.decode(parts, layout)
        except ModelFormatError as error:
            raise ModelFormatError(f"{self.where(name)}: {error}") from error

    def _collect(self) -> None:
        """Sort the checkpoint's tensors into parts of quantised weights and plain ones."""
        stored = self._source.names()
        # Names of parts may have dots; the longest that fits is meant.
        endings = sorted((f".{part}" for part in self._format.parts), key=len, reverse=True)
        split = {name: _split(name, endings) for name in stored}
        coded = {name for name in stored if holds_codes(self._source.dtype(name))}
        quantized = {split[name][0] for name in coded if split[name][1] in self._format.anchors}
        for name in stored:
            module, part = split[name]
            if module in quantized and part in self._format.parts:
                weight = f"{module}.weight"
                if weight not in self._parts:
                    self._parts[weight] = _ModuleParts(self._source, module, {})
                    self._order.append(weight)
                self._parts[weight].names[part] = name
            elif name not in coded:
                self._order.append(name)
            else:
                what = "8-bit floats" if self._source.dtype(name).is_floating_point else "integers"
                raise ModelFormatError(f"{self._source.where(name)} holds {what} that belong to no quantised weight.")

    def _layout(self, name: str) -> WeightLayout:
        try:
            return self._format.layout(self._parts[name])
        except ModelFormatError as error:
            raise ModelFormatError(f"{self.where(name)}: {error}") from error


def _split(name: str, endings: Sequence[str]) -> tuple[str, str]:
    """A tensor's module and its part in it, which is the first of `endings` that fits or what follows the last dot."""
    ending = next((ending for ending in endings if name.endswith(ending)), None)
    module, _, part = name.rpartition(".") if ending is None else (name[: -len(ending)], "", ending[1:])
    return module, part


def open_source(folder: Path, quantization: CheckpointQuantization | None) -> WeightSource:
    """The weights of a model folder: model.gguf where there is one, else safetensors files. Raises ModelFormatError."""
    if (folder / GGUF_FILE).is_file():
        from penstock.execution.quantization.gguf import GGUFSource

        return GGUFSource(folder / GGUF_FILE)
    if quantization is None:
        return SafetensorsSource(weight_files(folder))
    return QuantizedSource(SafetensorsSource(weight_files(folder), codes=True), checkpoint_format(quantization))
