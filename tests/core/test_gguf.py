"""The GGUF parser: what the format's own writer wrote, and every way in which a file can be wrong."""

from __future__ import annotations

import itertools
import math
import struct
import tracemalloc
from array import array
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import ModelFormatError
from penstock.core.gguf import MAX_HEADER_BYTES, GGUFFile, part_paths, read_gguf, read_gguf_parts
from tests.gguf_files import pair, raw_file, string, tensor_entry

ALIGNMENT_KEY = "general.alignment"


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def parse(folder: Path, content: bytes) -> GGUFFile:
    file = folder / "model.gguf"
    file.write_bytes(content)
    return read_gguf(file)


def write_sample(file: Path) -> None:
    """One pair of every type and tensors of several ranks and types."""
    writer = gguf.GGUFWriter(file, "llama")
    for kind, value in (
        ("uint8", 200),
        ("int8", -100),
        ("uint16", 65_000),
        ("int16", -32_000),
        ("uint32", 4_000_000_000),
        ("int32", -2_000_000_000),
        ("uint64", 2**63),
        ("int64", -(2**62)),
        ("float32", 0.5),
        ("float64", math.pi),
        ("bool", True),
        ("string", "größer"),
    ):
        getattr(writer, f"add_{kind}")(f"value.{kind}", value)
    writer.add_array("array.strings", ["a", "", "ä b"])
    writer.add_array("array.integers", [1, -2, 3])
    writer.add_array("array.floats", [0.25, -1.5])
    writer.add_tensor("vector", np.arange(7, dtype=np.float32))
    writer.add_tensor("matrix", np.zeros((3, 64), dtype=np.float16))
    writer.add_tensor("blocks", np.zeros((5, 68), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_the_formats_own_writer(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_sample(path)
    file = read_gguf(path)
    assert file.version == 3
    assert file.size == path.stat().st_size
    assert file.metadata["value.uint8"] == 200
    assert file.metadata["value.int8"] == -100
    assert file.metadata["value.uint64"] == 2**63
    assert file.metadata["value.int64"] == -(2**62)
    assert file.metadata["value.float64"] == math.pi
    assert file.metadata["value.bool"] is True
    assert file.string("value.string") == "größer"
    assert file.strings("array.strings") == ["a", "", "ä b"]
    assert file.integers("array.integers") == [1, -2, 3]
    assert list(file.numbers("array.floats")) == [0.25, -1.5]
    reader = gguf.GGUFReader(path)
    assert [(tensor.name, tensor.type.name, tensor.offset, tensor.nbytes) for tensor in file.tensors.values()] == [
        (tensor.name, tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors
    ]
    assert [tensor.shape for tensor in file.tensors.values()] == [(7,), (3, 64), (5, 64)]


def test_version_2_and_other_alignments(tmp_path: Path) -> None:
    content = raw_file(
        [pair(ALIGNMENT_KEY, 4, u32(256))], [tensor_entry("t", [4], 0, 256)], bytes(256 + 16), version=2, alignment=256
    )
    file = parse(tmp_path, content)
    assert file.version == 2
    assert file.tensors["t"].offset == 512


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no GGUF file"),
        (b"GG", "no GGUF file"),
        (b"PK\x03\x04" + bytes(60), "does not start with 'GGUF'"),
        (raw_file(version=1), "version 1; versions 2 and 3 are supported; convert the model again"),
        (raw_file(version=4), "version 4; .*newer Penstock"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
        (b"GGUF\x03\0\0\0", "needs 8 bytes at byte 8, the file ends at byte 8"),
        (raw_file(num_tensors=2**63), "says that there are 9223372036854775808 tensors"),
        (raw_file(num_pairs=2**40), "says that there are 1099511627776 metadata pairs"),
        (raw_file([pair("a", 0, b"\1")], num_pairs=2) + bytes(8), "metadata pair 1: the key is empty"),
        (raw_file([pair("a", 0, b"\1"), pair("a", 0, b"\1")]), "a: the key is there twice"),
        (raw_file([pair("", 0, b"\1")]), "the key is empty"),
        (raw_file([pair(b"\xff\xfe", 0, b"\1")]), "not UTF-8"),
        (raw_file([u64(2**16) + bytes(2**16) + u32(0) + b"\1"]), "says that a string has 65536 bytes; at most 65535"),
        (raw_file([pair("a", 13, b"\1")]), "a: value type 13 does not exist"),
        (raw_file([pair("a", 7, b"\2")]), "a: a truth value must be 0 or 1, not 2"),
        (raw_file([pair("a", 8, u64(2**62))]), "a: says that a string has 4611686018427387904 bytes"),
        (raw_file([pair("a", 8, u64(100) + b"xyz")]), "a: needs 100 bytes"),
        (raw_file([pair("a", 8, string(b"\xc3"))]), "a: a string is not UTF-8"),
        (raw_file([pair("a", 9, u32(4) + u64(2**61))]), "a: says that there are 2305843009213693952 numbers"),
        (raw_file([pair("a", 9, u32(8) + u64(2**58))]), "a: says that there are 288230376151711744 strings"),
        (raw_file([pair("a", 9, u32(8) + u64(2) + string("x") + u64(2**63))]), "a: needs 9223372036854775816 bytes"),
        (raw_file([pair("a", 9, u32(8) + u64(2) + string("x") + string(b"\xff"))]), "a: string 1 is not UTF-8"),
        (raw_file([pair("a", 9, u32(9) + u64(1) + u32(0) + u64(0))]), "a: arrays of arrays are not supported"),
        (raw_file([pair("a", 9, u32(77) + u64(0))]), "a: type 77 does not exist"),
        (
            raw_file([pair(ALIGNMENT_KEY, 4, u32(48))]),
            "general.alignment: must be a power of two up to 1048576, not 48",
        ),
        (raw_file([pair(ALIGNMENT_KEY, 4, u32(0))]), "general.alignment: must be a power of two"),
        (raw_file([pair(ALIGNMENT_KEY, 4, u32(2**31))]), "general.alignment: must be a power of two"),
        (raw_file([pair(ALIGNMENT_KEY, 7, b"\1")]), "general.alignment: must be a power of two"),
        (raw_file([pair(ALIGNMENT_KEY, 8, string("32"))]), "general.alignment: must be a power of two"),
        (raw_file([], [tensor_entry("", [4], 0, 0)], bytes(16)), "tensor 0: the name is empty"),
        (raw_file([], [tensor_entry("x" * 64, [4], 0, 0)], bytes(16)), "a string has 64 bytes; at most 63"),
        (raw_file([], [tensor_entry("t", [4], 0, 0)] * 2, bytes(64)), "tensor 't': the name is there twice"),
        (raw_file([], [tensor_entry("t", [], 0, 0)], bytes(64)), "tensor 't': must have 1 to 4 dimensions, not 0"),
        (raw_file([], [tensor_entry("t", [1] * 5, 0, 0)], bytes(64)), "must have 1 to 4 dimensions, not 5"),
        (raw_file([], [tensor_entry("t", [4, 0], 0, 0)], bytes(64)), r"tensor 't': has shape \[0, 4\]"),
        (raw_file([], [tensor_entry("t", [48], 8, 0)], bytes(64)), "Q8_0 needs rows of a multiple of 32 numbers"),
        (raw_file([], [tensor_entry("t", [4], 4, 0)], bytes(64)), "tensor 't': has type 4, which does not exist"),
        (raw_file([], [tensor_entry("t", [4], 0, 8)], bytes(64)), "offset 8, which is no multiple of the alignment 32"),
        (
            raw_file([], [tensor_entry("t", [4], 0, 32)], bytes(47)),
            "tensor 't': ends at byte 112, the file at byte 111",
        ),
        (raw_file([], [tensor_entry("t", [2**62, 2**62], 0, 0)], bytes(64)), "tensor 't': ends at byte"),
        (raw_file([], [tensor_entry("t", [4], 0, 2**64 - 32)], bytes(64)), "tensor 't': ends at byte"),
        (
            raw_file([], [tensor_entry("b", [4], 0, 32), tensor_entry("a", [16], 0, 0)], bytes(64)),
            "tensor 'b': overlaps tensor 'a'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message) as caught:
        parse(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "model.gguf"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"model\.gguf cannot be read: No such file"):
        read_gguf(tmp_path / "model.gguf")


def test_metadata_has_a_bound_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with file.open("wb") as opened:
        opened.write(raw_file([pair("a", 9, u32(0) + u64(MAX_HEADER_BYTES))]))
        opened.truncate(4 * MAX_HEADER_BYTES)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError, match=f"says that there are {MAX_HEADER_BYTES} numbers"):
            read_gguf(file)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda file: file.integer("missing"), "missing: is missing from the metadata"),
        (lambda file: file.integer("value.string"), "value.string: must be an integer, not 'größer'"),
        (lambda file: file.integer("value.bool"), "value.bool: must be an integer, not True"),
        (lambda file: file.integer("value.uint64"), "value.uint64: must be between 0 and 2147483647"),
        (lambda file: file.integer("value.int8"), "value.int8: must be between 0 and"),
        (lambda file: file.number("value.string"), "value.string: must be a finite number"),
        (lambda file: file.boolean("value.uint8"), "value.uint8: must be true or false, not 200"),
        (lambda file: file.string("value.uint8"), "value.uint8: must be a string, not 200"),
        (lambda file: file.strings("array.integers"), "array.integers: must be an array of strings"),
        (lambda file: file.numbers("array.strings"), "array.strings: must be an array of numbers"),
        (lambda file: file.integers("array.floats"), "array.floats: must be an array of integers"),
    ],
)
def test_fields_are_checked_where_they_are_read(tmp_path: Path, read: object, message: str) -> None:
    write_sample(tmp_path / "model.gguf")
    with pytest.raises(ModelFormatError, match=message):
        read(read_gguf(tmp_path / "model.gguf"))  # type: ignore[operator]


def test_defaults(tmp_path: Path) -> None:
    file = parse(tmp_path, raw_file([pair("nan", 6, struct.pack("<f", math.nan))]))
    assert file.integer("missing", 7) == 7
    assert file.number("missing", 0.5) == 0.5
    assert file.boolean("missing", False) is False
    assert file.string("missing", "x") == "x"
    assert file.strings("missing", []) == []
    with pytest.raises(ModelFormatError, match="nan: must be a finite number"):
        file.number("nan")


# ---- split models ----


def write_parts(
    folder: Path, count: int, *, numbers: list[int] | None = None, names: list[str] | None = None
) -> list[Path]:
    paths = [folder / f"m-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for index, path in enumerate(paths):
        pairs = [
            pair("split.no", 2, struct.pack("<H", (numbers or list(range(count)))[index])),
            pair("split.count", 2, struct.pack("<H", count)),
            pair("split.tensors.count", 5, struct.pack("<i", count)),
        ]
        name = (names or [f"t{index}" for index in range(count)])[index]
        path.write_bytes(raw_file(pairs, [tensor_entry(name, [4], 0, 0)], bytes(16)))
    return paths


def test_any_part_finds_the_others(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 3)
    for path in paths:
        assert part_paths(path) == paths
        assert [part.path for part in read_gguf_parts(path)] == paths
    assert part_paths(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 2, numbers=[0, 0])
    with pytest.raises(ModelFormatError, match=r"split\.no: is 0, not 1"):
        read_gguf_parts(paths[0])
    write_parts(tmp_path, 2, names=["t", "t"])
    with pytest.raises(ModelFormatError, match="tensor 't' is in another part as well"):
        read_gguf_parts(paths[0])
    write_parts(tmp_path, 2)
    renamed = tmp_path / "other.gguf"
    paths[0].rename(renamed)
    with pytest.raises(ModelFormatError, match=r"split\.count: is 2, but the name of the file"):
        read_gguf_parts(renamed)
    with pytest.raises(ModelFormatError, match="cannot be read"):
        read_gguf_parts(paths[1])


# ---- anything at all ----

VALUES = st.one_of(
    st.tuples(st.sampled_from([0, 1, 7]), st.binary(min_size=1, max_size=1)),
    st.tuples(st.sampled_from([4, 5, 6]), st.binary(min_size=4, max_size=4)),
    st.tuples(st.just(8), st.binary(max_size=8).map(string)),
    st.tuples(st.just(9), st.builds(lambda kind, data: u32(kind) + data, st.integers(0, 13), st.binary(max_size=40))),
    st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=16)),
)
PAIRS = st.lists(
    st.builds(lambda key, value: pair(key, *value), st.sampled_from(["a", "b", ALIGNMENT_KEY, ""]), VALUES), max_size=3
)
ENTRIES = st.lists(
    st.builds(
        tensor_entry,
        st.sampled_from(["t", "u", "v", ""]),
        st.lists(st.one_of(st.integers(0, 64), st.integers(0, 2**64 - 1)), max_size=5),
        st.integers(0, 42),
        st.one_of(st.integers(0, 8).map(lambda number: 32 * number), st.integers(0, 2**64 - 1)),
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(
    PAIRS, ENTRIES, st.integers(0, 300), st.integers(0, 400), st.binary(max_size=4), st.sampled_from([2, 3, 3, 3, 1])
)
def test_only_its_own_error_comes_out(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[bytes],
    entries: list[bytes],
    data_bytes: int,
    position: int,
    damage: bytes,
    version: int,
) -> None:
    """Files that are nearly right, with a few bytes changed: parsed with tensors inside the file and apart, or refused."""
    content = bytearray(raw_file(pairs, entries, bytes(data_bytes), version=version))
    content[position : position + len(damage)] = damage
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(content)
    try:
        file = read_gguf(path)
    except ModelFormatError:
        return
    places = sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in file.tensors.values())
    assert all(end <= len(content) for _, end in places)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(places))
    assert all(not isinstance(value, array) or len(value) <= len(content) for value in file.metadata.values())


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 2000))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    write_sample(path)
    content = path.read_bytes()
    # The last tensor's bytes may be followed by padding, which nothing needs.
    end = max(tensor.offset + tensor.nbytes for tensor in read_gguf(path).tensors.values())
    path.write_bytes(content[: min(cut, end - 1)])
    with pytest.raises(ModelFormatError):
        read_gguf(path)
