"""Metadata from anywhere: a folder is made that can be read, or the file is refused with its own error."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import ModelFormatError
from penstock.core.gguf import read_gguf_parts
from penstock.hub.gguf_config import model_config
from penstock.hub.gguf_tokenizer import tokenizer_files
from tests.gguf_files import pair, raw_file, string, tensor_entry

UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5


def array_of(type_number: int, items: list[bytes]) -> bytes:
    return struct.pack("<IQ", type_number, len(items)) + b"".join(items)


INTEGERS = st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**32 - 1])).map(
    lambda n: (UINT32, struct.pack("<I", n))
)
FLOATS = st.floats(width=32).map(lambda value: (FLOAT32, struct.pack("<f", value)))
BOOLS = st.booleans().map(lambda value: (BOOL, bytes([value])))
WORDS = st.sampled_from(
    ["gpt2", "llama", "qwen2", "none", "default", "linear", "yarn", "a b", "ab", "a", "", "<s>", "▁", "é "]
)
STRINGS = WORDS.map(lambda word: (STRING, string(word)))
STRING_ARRAYS = st.lists(WORDS, max_size=6).map(
    lambda words: (ARRAY, array_of(STRING, [string(word) for word in words]))
)
INTEGER_ARRAYS = st.lists(st.integers(-1, 7), max_size=6).map(
    lambda numbers: (ARRAY, array_of(INT32, [struct.pack("<i", number) for number in numbers]))
)
FLOAT_ARRAYS = st.lists(st.floats(width=32), max_size=6).map(
    lambda numbers: (ARRAY, array_of(FLOAT32, [struct.pack("<f", number) for number in numbers]))
)
ANYTHING = st.one_of(INTEGERS, FLOATS, BOOLS, STRINGS, STRING_ARRAYS, INTEGER_ARRAYS, FLOAT_ARRAYS)

# What a sane file has under its keys; the lists of the vocabulary are of one length.
NUM_TOKENS = 5
SIZES = st.integers(1, 40).map(lambda number: (UINT32, struct.pack("<I", number)))
IDS = st.integers(0, 6).map(lambda number: (UINT32, struct.pack("<I", number)))
FINITE = st.floats(min_value=0, max_value=2.0**100, width=32)
NUMBERS = FINITE.map(lambda value: (FLOAT32, struct.pack("<f", value)))
TOKENS = st.lists(WORDS, min_size=NUM_TOKENS, max_size=NUM_TOKENS).map(
    lambda words: (ARRAY, array_of(STRING, [string(word) for word in words]))
)
KINDS = st.lists(st.integers(1, 6), min_size=NUM_TOKENS, max_size=NUM_TOKENS).map(
    lambda numbers: (ARRAY, array_of(INT32, [struct.pack("<i", number) for number in numbers]))
)
SCORES = st.lists(FINITE, min_size=NUM_TOKENS, max_size=NUM_TOKENS).map(
    lambda numbers: (ARRAY, array_of(FLOAT32, [struct.pack("<f", number) for number in numbers]))
)


def one_of(*words: str) -> st.SearchStrategy[tuple[int, bytes]]:
    return st.sampled_from(words).map(lambda word: (STRING, string(word)))


USUAL = {
    "general.architecture": one_of("llama", "qwen2"),
    **{
        f"{architecture}.{key}": values
        for architecture in ("llama", "qwen2")
        for key, values in {
            "context_length": SIZES,
            "embedding_length": st.just((UINT32, struct.pack("<I", 8))),
            "block_count": SIZES,
            "feed_forward_length": SIZES,
            "attention.head_count": st.sampled_from([1, 2, 4]).map(lambda n: (UINT32, struct.pack("<I", n))),
            "attention.layer_norm_rms_epsilon": NUMBERS,
            "rope.freq_base": NUMBERS,
            "rope.scaling.type": one_of("none", "linear", "yarn"),
            "rope.scaling.factor": NUMBERS,
            "rope.scaling.original_context_length": SIZES,
            "rope.scaling.attn_factor": NUMBERS,
        }.items()
    },
    "tokenizer.ggml.model": one_of("gpt2", "llama"),
    "tokenizer.ggml.pre": one_of("gpt-2", "qwen2", "default", "llama-bpe"),
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.scores": SCORES,
    "tokenizer.ggml.merges": st.just((ARRAY, array_of(STRING, []))),
    "tokenizer.ggml.bos_token_id": IDS,
    "tokenizer.ggml.eos_token_id": IDS,
    "tokenizer.ggml.unknown_token_id": IDS,
    "tokenizer.ggml.add_bos_token": BOOLS,
}


@st.composite
def metadata(draw: st.DrawFn) -> list[bytes]:
    """Every usual key with a value of its kind, but for some that are missing or hold anything."""
    odd = draw(st.dictionaries(st.sampled_from(sorted(USUAL)), st.one_of(st.none(), ANYTHING), max_size=3))
    values: dict[str, Any] = {key: odd.get(key, ()) for key in USUAL}
    drawn = {key: draw(USUAL[key]) if value == () else value for key, value in values.items()}
    return [pair(key, *value) for key, value in drawn.items() if value is not None]


@settings(max_examples=80, deadline=None)
@given(metadata(), st.one_of(st.none(), st.lists(st.floats(width=32), min_size=4, max_size=4)))
def test_only_its_own_error_comes_out(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[bytes], factors: list[float] | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    entries = [tensor_entry("token_embd.weight", [8, NUM_TOKENS], 0, 0), tensor_entry("rope_freqs.weight", [4], 0, 160)]
    data = bytes(160) + struct.pack("<4f", *(factors or [0.0] * 4))
    path.write_bytes(raw_file(pairs, entries[: 1 if factors is None else 2], data))
    parts = read_gguf_parts(path)
    for convert in (lambda: model_config(parts, [0]), lambda: tokenizer_files(parts[0])):
        try:
            result = convert()
        except ModelFormatError:
            continue
        if isinstance(result, dict):
            assert json.loads(json.dumps(result, allow_nan=False)) == result
        elif result.tokenizer is not None:
            backend = tokenizers.Tokenizer.from_str(json.dumps(result.tokenizer))
            assert isinstance(backend.encode("a b é").ids, list)
