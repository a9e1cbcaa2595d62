"""GGUF, llama.cpp's file format: header, metadata and the table of tensors. Reads no weights.

    magic "GGUF" │ version u32 │ tensors u64 │ pairs u64 │ pairs: key, type, value │ table: name, shape, type, offset │ padding │ data

All numbers are little-endian, a string is its length (u64) and its UTF-8 bytes, an offset counts from the start of the data. A file may
come from anywhere: every count, length, offset and alignment is checked against what is left of the file before anything of that size
is made, and header and table may take at most 64 MiB together, many times what the largest vocabulary needs.

Source: the specification at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3 (the same but for big-endian files,
which are refused).
"""

from __future__ import annotations

import math
import re
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NoReturn

from penstock.core.errors import ModelFormatError
from penstock.core.gguf_format import TENSOR_TYPES, GGUFFile, GGUFTensor, TensorType, Value, shortened

__all__ = ["GGUFFile", "GGUFTensor", "TensorType", "part_paths", "read_gguf", "read_gguf_parts"]

MAX_HEADER_BYTES = 64 * 2**20
MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 2**16 - 1
MAX_TENSOR_NAME_BYTES = 63
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20

# How llama.cpp's gguf-split names the parts of a model: NAME-00001-of-00003.gguf.
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_CHUNK_BYTES = 2**20
_STRING_TYPE, _ARRAY_TYPE, _BOOL_TYPE = 8, 9, 7
# Type number → struct and array code; bool is a byte that must be 0 or 1.
_NUMBER_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
# A name's length, number of dimensions, one dimension, type and offset; a key's length, one byte of it, type and one byte of value.
_MIN_TENSOR_BYTES, _MIN_PAIR_BYTES = 8 + 4 + 8 + 4 + 8, 8 + 1 + 4 + 1


def read_gguf(path: Path) -> GGUFFile:
    """Read header, metadata and table. Raises ModelFormatError that names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            return _Parser(path, file).parse()
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.") from error


def part_paths(path: Path) -> list[Path]:
    """All parts of the split model that `path` is a part of, by its name, first part first; [path] for any other file."""
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def read_gguf_parts(path: Path) -> list[GGUFFile]:
    """The file, or all parts of a split model (`path`: any of them); the first carries the model's metadata.

    Raises ModelFormatError, also when a part is missing or belongs to another model.
    """
    paths = part_paths(path)
    first = read_gguf(paths[0])
    count = first.integer("split.count", 1)
    if max(count, 1) != len(paths):
        first.fail(
            "split.count", f"is {count}, but the name of the file makes it one of {len(paths)} parts; keep the names"
        )
    if missing := [part.name for part in paths if not part.is_file()]:
        raise ModelFormatError(f"{paths[0]}: the part {missing[0]} is missing beside it; get all {len(paths)} parts.")
    parts = [first, *map(read_gguf, paths[1:])]
    names: set[str] = set()
    for number, part in enumerate(parts):
        if len(parts) > 1 and part.integer("split.no") != number:
            part.fail("split.no", f"is {part.integer('split.no')}, not {number} as the name of the file says")
        if twice := names.intersection(part.tensors):
            raise ModelFormatError(f"{part.path}: tensor {min(twice)!r} is in another part as well.")
        names.update(part.tensors)
    if len(parts) > 1 and len(names) != first.integer("split.tensors.count", len(names)):
        first.fail(
            "split.tensors.count", f"is {first.integer('split.tensors.count')}, the parts have {len(names)} tensors"
        )
    return parts


class _Parser:
    """Goes through a file's head once. `what` names the part at hand in messages."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = file.seek(0, 2)
        file.seek(0)
        self.data = bytearray()
        self.position = 0
        self.what = "header"

    def parse(self) -> GGUFFile:
        if self._take(min(4, self.size)) != b"GGUF":
            self._fail("does not start with 'GGUF'; this is no GGUF file")
        version = self._number("I")
        if version & 0xFFFF == 0 and version:
            self._fail("is big-endian; convert the model again without --bigendian")
        if version not in (2, 3):
            hint = "convert the model again with a current llama.cpp" if version < 2 else "this needs a newer Penstock"
            self._fail(f"has GGUF version {version}; versions 2 and 3 are supported; {hint}")
        num_tensors, num_pairs = self._number("Q"), self._number("Q")
        self._check_count(num_tensors, _MIN_TENSOR_BYTES, "tensors")
        self._check_count(num_pairs, _MIN_PAIR_BYTES, "metadata pairs")
        metadata = self._metadata(num_pairs)
        tensors = self._tensors(num_tensors, self._alignment(metadata))
        return GGUFFile(self.path, version, metadata, tensors, self.position, self.size)

    def _metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for index in range(count):
            self.what = f"metadata pair {index}"
            key = self._string(MAX_KEY_BYTES)
            self.what = key or self.what
            if not key or key in metadata:
                self._fail("the key is there twice" if key else "the key is empty")
            metadata[key] = self._metadata_value(self._number("I"))
        return metadata

    def _metadata_value(self, number: int) -> Value:
        if number == _STRING_TYPE:
            return self._string(MAX_HEADER_BYTES)
        if number == _ARRAY_TYPE:
            return self._array(self._number("I"))
        if number not in _NUMBER_CODES:
            self._fail(f"value type {number} does not exist")
        code = _NUMBER_CODES[number]
        value: int | float = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        if number != _BOOL_TYPE:
            return value
        if value not in (0, 1):
            self._fail(f"a truth value must be 0 or 1, not {value}")
        return bool(value)

    def _array(self, number: int) -> Value:
        count = self._number("Q")
        if number == _STRING_TYPE:
            self._check_count(count, 8, "strings")
            return self._strings(count)
        if number not in _NUMBER_CODES:
            self._fail(
                "arrays of arrays are not supported" if number == _ARRAY_TYPE else f"type {number} does not exist"
            )
        values = array(_NUMBER_CODES[number])
        self._check_count(count, values.itemsize, "numbers")
        values.frombytes(self._take(count * values.itemsize))
        return values

    def _alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        self.what = "general.alignment"
        is_power_of_two = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
        if (
            isinstance(alignment, bool)
            or not isinstance(alignment, int)
            or not is_power_of_two
            or alignment > MAX_ALIGNMENT
        ):
            self._fail(f"must be a power of two up to {MAX_ALIGNMENT}, not {shortened(alignment)}")
        return alignment

    def _tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        entries: dict[str, tuple[tuple[int, ...], TensorType, int]] = {}
        for index in range(count):
            self.what = f"tensor {index}"
            name = self._string(MAX_TENSOR_NAME_BYTES)
            self.what = f"tensor {name!r}" if name else self.what
            if not name or name in entries:
                self._fail("the name is there twice" if name else "the name is empty")
            entries[name] = self._tensor_entry(alignment)
        start = -(-self.position // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in entries.items():
            self.what = f"tensor {name!r}"
            nbytes = math.prod(shape) // kind.block_values * kind.block_bytes
            if start + offset + nbytes > self.size:
                self._fail(
                    f"ends at byte {start + offset + nbytes}, the file at byte {self.size}; it is cut short: get it again"
                )
            tensors[name] = GGUFTensor(name, shape, kind, start + offset, nbytes)
        self._check_overlap(tensors)
        return tensors

    def _tensor_entry(self, alignment: int) -> tuple[tuple[int, ...], TensorType, int]:
        num_dimensions = self._number("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            self._fail(f"must have 1 to {MAX_DIMENSIONS} dimensions, not {num_dimensions}")
        shape = tuple(reversed([self._number("Q") for _ in range(num_dimensions)]))
        type_number, offset = self._number("I"), self._number("Q")
        kind = TENSOR_TYPES.get(type_number)
        if kind is None:
            self._fail(f"has type {type_number}, which does not exist in the format as known here")
        if 0 in shape or shape[-1] % kind.block_values:
            self._fail(f"has shape {list(shape)}; {kind.name} needs rows of a multiple of {kind.block_values} numbers")
        if offset % alignment:
            self._fail(f"starts at offset {offset}, which is no multiple of the alignment {alignment}")
        return shape, kind, offset

    def _check_overlap(self, tensors: Mapping[str, GGUFTensor]) -> None:
        end, previous = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                self.what = f"tensor {tensor.name!r}"
                self._fail(f"overlaps tensor {previous!r}")
            end, previous = tensor.offset + tensor.nbytes, tensor.name

    def _check_count(self, count: int, least_bytes: int, of_what: str) -> None:
        """Refuse a count that what is left of the file cannot hold."""
        if count * least_bytes > min(self.size, MAX_HEADER_BYTES) - self.position:
            self._fail(f"says that there are {count} {of_what}, more than can follow in this file")

    def _number(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return value

    def _string(self, most_bytes: int) -> str:
        length = self._number("Q")
        if length > most_bytes:
            self._fail(f"says that a string has {length} bytes; at most {most_bytes} are allowed here")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            self._fail(f"a string is not UTF-8: {error.reason}", error)

    def _strings(self, count: int) -> list[str]:
        """Like `_string` again and again, but a vocabulary has hundreds of thousands of them."""
        texts = []
        data, unpack = self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = self.position + 8
            if start > len(data):
                self._load(8)
            end = start + unpack(data, self.position)[0]
            if end > len(data):
                self._load(end - self.position)
            try:
                texts.append(data[start:end].decode())
            except UnicodeDecodeError as error:
                self._fail(f"string {len(texts)} is not UTF-8: {error.reason}", error)
            self.position = end
        return texts

    def _take(self, count: int) -> bytes:
        """The next `count` bytes, which must be there."""
        self._load(count)
        end = self.position + count
        taken = bytes(self.data[self.position : end])
        self.position = end
        return taken

    def _load(self, count: int) -> None:
        """See to it that `data` holds the next `count` bytes. The file is read in pieces and never further than needed."""
        end = self.position + count
        if end > self.size:
            self._fail(f"needs {count} bytes at byte {self.position}, the file ends at byte {self.size}; get it again")
        if end > MAX_HEADER_BYTES:
            self._fail(f"the metadata takes more than {MAX_HEADER_BYTES} bytes; that is no language model's")
        while len(self.data) < end:
            piece = self.file.read(max(_CHUNK_BYTES, end - len(self.data)))
            if not piece:
                self._fail("the file became shorter while it was read")
            self.data += piece

    def _fail(self, problem: str, cause: Exception | None = None) -> NoReturn:
        raise ModelFormatError(f"{self.path}: {self.what}: {problem}.") from cause
