"""The weights of a GGUF file under the names of a Hugging Face checkpoint. A WeightSource (execution/models/source.py).

Two things differ from a checkpoint besides names and blocks. llama.cpp rotates neighbouring values of a head where transformers rotates its
halves, so for architecture `llama` its converter interleaves the rows of the query and key projections, weights and biases alike:

    checkpoint, per head   a0 a1 … a(D/2-1)  b0 b1 … b(D/2-1)
    file, per head         a0 b0 a1 b1 … a(D/2-1) b(D/2-1)

which is undone here. And a file without output.weight has tied embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.core.errors import ModelFormatError
from penstock.core.gguf import GGUFFile, GGUFTensor, part_paths, read_gguf_parts
from penstock.execution.kernels.quantized import QuantizedTensor, StoredWeight
from penstock.execution.parallel.shard_reading import read_pieces
from penstock.execution.parallel.sharding import WHOLE, Shard
from penstock.execution.quantization.gguf_blocks import BLOCK_FORMATS, BlockFormat
from penstock.execution.quantization.part import cut_weight

FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(?P<layer>0|[1-9]\d{0,5})\.(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")
# Constants of the rotary embedding, which the folder's config.json says as well.
_IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.(rope_freqs|attn_rot_embd)(\.weight)?")
# Quantised tensors are read and taken apart in pieces of about this size, so that reading needs little memory besides the result.
_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor and its file. `interleaved_heads`: heads whose rows are interleaved; 0 where none are."""

    file: GGUFFile
    tensor: GGUFTensor
    interleaved_heads: int


class GGUFSource:
    """Reads one GGUF file, or all parts of a split model. Nothing is read but the head until `read` is called.

    Raises ModelFormatError for a broken file, and one that names the tensor for a tensor that no supported architecture has or whose type
    cannot be read.
    """

    def __init__(self, file: Path) -> None:
        if file.is_symlink() and part_paths(file) == [file]:
            # The link in a model folder: messages name the user's file, and the parts of a split model lie beside that.
            file = file.parent / file.readlink()
        parts = read_gguf_parts(file)
        self.metadata = parts[0]
        self._entries = {name: entry for part in parts for name, entry in _entries(part, parts[0])}

    def names(self) -> Sequence[str]:
        """In the order of the files."""
        return sorted(
            self._entries, key=lambda name: (self._entries[name].file.path, self._entries[name].tensor.offset)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """[N, K] for a linear weight."""
        return self._entries[name].tensor.shape

    def nbytes(self, name: str) -> int:
        """Bytes on disk."""
        return self._entries[name].tensor.nbytes

    def where(self, name: str) -> str:
        """For messages."""
        entry = self._entries[name]
        return f"{entry.file.path}: tensor {entry.tensor.name}"

    def read(self, name: str, shard: Shard = WHOLE) -> StoredWeight:
        """The tensor as stored (float32, float16 or bfloat16), or its codes and scales: the very weights of the file in both cases.

        A shard is read from the first to the last block that has something of it, and by whole heads where those are interleaved. Raises
        ModelFormatError when the file cannot be read or is shorter than it was.
        """
        entry = self._entries[name]
        block_format = BLOCK_FORMATS.get(entry.tensor.type.name)
        try:
            with entry.file.path.open("rb", buffering=0) as file:
                if block_format is None:
                    return _read_floats(file.fileno(), entry, shard)
                rows, columns = shard.rows or (0, entry.tensor.shape[0]), shard.columns or (0, entry.tensor.shape[1])
                region = _Region.around(entry, rows, columns)
                value = _read_blocks(file.fileno(), entry, block_format, region)
        except EOFError as error:
            message = f"{self.where(name)} ends too early; the file became shorter while it was read."
            raise ModelFormatError(message) from error
        except OSError as error:
            raise ModelFormatError(f"{self.where(name)} cannot be read: {error.strerror or error}.") from error
        (first_row, _), (first_column, _) = region.rows, region.columns
        return cut_weight(
            value,
            (rows[0] - first_row, rows[1] - first_row),
            (columns[0] - first_column, columns[1] - first_column),
            self.where(name),
        )


@dataclass(frozen=True, slots=True)
class _Region:
    """Rows [start, stop) and columns [start, stop) of a tensor, of whole blocks and, where they are interleaved, whole heads. unit: rows
    that stay in one piece."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    unit: int

    @classmethod
    def around(cls, entry: _Entry, rows: tuple[int, int], columns: tuple[int, int]) -> _Region:
        """The smallest one that has these rows and columns."""
        unit = entry.tensor.shape[0] // entry.interleaved_heads if entry.interleaved_heads else 1
        values = entry.tensor.type.block_values
        return cls(_widened(rows, unit), _widened(columns, values), unit)


def _read_floats(descriptor: int, entry: _Entry, shard: Shard) -> Tensor:
    shape, dtype = entry.tensor.shape, FLOAT_TYPES[entry.tensor.type.name]
    rows = shard.rows or (0, shape[0])
    columns = (0, shape[1]) if len(shape) > 1 else (0, 1)
    if len(shape) > 1 and shard.columns is not None:
        columns = shard.columns
    region = _Region.around(entry, rows, columns)
    values = torch.empty(region.rows[1] - region.rows[0], columns[1] - columns[0], dtype=dtype)
    stride = entry.tensor.nbytes // shape[0]
    begin = entry.tensor.offset + region.rows[0] * stride + columns[0] * dtype.itemsize
    read_pieces(descriptor, values, begin, stride)
    if entry.interleaved_heads:
        values = _undo_interleaving(values, len(values) // region.unit)
    values = values[rows[0] - region.rows[0] : rows[1] - region.rows[0]]
    return values if len(shape) > 1 else values.flatten()


def _read_blocks(descriptor: int, entry: _Entry, block_format: BlockFormat, region: _Region) -> QuantizedTensor:
    first, last = region.rows
    rows, columns = last - first, region.columns[1] - region.columns[0]
    kind, stride = entry.tensor.type, entry.tensor.nbytes // entry.tensor.shape[0]
    row_bytes = columns // kind.block_values * kind.block_bytes
    begin = entry.tensor.offset + region.columns[0] // kind.block_values * kind.block_bytes
    # Units stay in one piece, where their order is put right while they are smallest.
    step = min(rows, max(1, _PIECE_BYTES // (row_bytes * region.unit)) * region.unit)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    groups = (rows, columns // block_format.group_size)
    scales = torch.empty(groups, dtype=torch.float32)
    offsets: Tensor | None = None
    buffer = torch.empty(step, row_bytes, dtype=torch.uint8)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        piece = buffer[: end - start]
        read_pieces(descriptor, piece, begin + (first + start) * stride, stride)
        if entry.interleaved_heads:
            piece = _undo_interleaving(piece, len(piece) // region.unit)
        decoded = block_format.decode(piece.view(-1, kind.block_bytes))
        codes[start:end] = decoded[0].view(-1, columns)
        scales[start:end] = decoded[1].view(-1, groups[1])
        if decoded[2] is not None:
            offsets = torch.empty(groups, dtype=torch.float32) if offsets is None else offsets
            offsets[start:end] = decoded[2].view(-1, groups[1])
    return QuantizedTensor(codes, block_format.bits, block_format.group_size, scales, offsets)


def _widened(span: tuple[int, int], unit: int) -> tuple[int, int]:
    return span[0] // unit * unit, -(-span[1] // unit) * unit


def _entries(part: GGUFFile, first: GGUFFile) -> list[tuple[str, _Entry]]:
    """Names and tensors of one file; `first` carries the metadata. Raises ModelFormatError."""
    architecture = first.string("general.architecture")
    heads = {}
    if architecture == "llama":
        num_heads = first.integer("llama.attention.head_count", minimum=1)
        heads = {"q_proj": num_heads, "k_proj": first.integer("llama.attention.head_count_kv", num_heads, minimum=1)}
    entries = []
    for tensor in part.tensors.values():
        if _IGNORED.fullmatch(tensor.name):
            continue
        name = checkpoint_name(tensor.name)
        if name is None:
            part.fail(f"tensor {tensor.name!r}", "the models that can be run have no such tensor")
        _check_type(part, tensor)
        interleaved = heads.get(name.split(".")[-2], 0)
        if interleaved and tensor.shape[0] % (2 * interleaved):
            part.fail(
                f"tensor {tensor.name!r}", f"has {tensor.shape[0]} rows, no even number for each of {interleaved} heads"
            )
        entries.append((name, _Entry(part, tensor, interleaved)))
    return entries


def checkpoint_name(name: str) -> str | None:
    """blk.0.attn_q.weight → model.layers.0.self_attn.q_proj.weight; None when no supported architecture has such a tensor."""
    module, _, kind = name.rpartition(".")
    if module in _MODEL_NAMES and kind == "weight":
        return f"{_MODEL_NAMES[module]}.weight"
    match = _LAYER.fullmatch(name)
    if match is None or match["part"] not in _LAYER_NAMES:
        return None
    return f"model.layers.{match['layer']}.{_LAYER_NAMES[match['part']]}.{match['kind']}"


def _check_type(part: GGUFFile, tensor: GGUFTensor) -> None:
    kind = tensor.type.name
    if kind not in BLOCK_FORMATS and kind not in FLOAT_TYPES:
        supported = ", ".join((*FLOAT_TYPES, *BLOCK_FORMATS))
        part.fail(
            f"tensor {tensor.name!r}",
            f"has type {kind}; supported: {supported}; take another quantisation of the model",
        )
    if len(tensor.shape) > 2 or (len(tensor.shape) == 1 and kind in BLOCK_FORMATS):
        part.fail(
            f"tensor {tensor.name!r}",
            f"has shape {list(tensor.shape)}, which no {kind} tensor of a supported model has",
        )


def _undo_interleaving(values: Tensor, heads: int) -> Tensor:
    """values [heads * D, …] with every head's rows in the order of a checkpoint."""
    return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
