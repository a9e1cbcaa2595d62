"""tokenizer.json and tokenizer_config.json from a GGUF file's metadata.

    tokenizer.ggml.model = gpt2     byte-level BPE: tokens and merges; `pre` names how text is cut (gguf_pretokenizers)
    tokenizer.ggml.model = llama    SentencePiece's BPE: tokens and scores, the best score merged first; bytes are the fallback

The result is the form that transformers' own converters give these tokenizers, so that the frontend needs to know one form only. Texts
become the ids that llama.cpp gives them, but for Qwen's Unicode normalisation, which its tokenizer has and llama.cpp leaves out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.core.gguf import GGUFFile
from penstock.hub.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer

# Values of tokenizer.ggml.token_type. Of unused tokens only the padding that the converter invents is left out.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_PADDING = re.compile(r"\[PAD\d+\]")
_SPACE = "▁"

# Texts of tokens that end an answer, which files often fail to say (llama.cpp's list in llama-vocab.cpp).
_END_TEXTS = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    )
)


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of the two files, None for a model without a tokenizer; `eos_token_ids` end an answer, the usual one first."""

    tokenizer: dict[str, Any] | None
    tokenizer_config: dict[str, Any] | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def tokenizer_files(file: GGUFFile) -> TokenizerFiles:
    """Raises ModelFormatError that names the file and the key."""
    kind = file.string("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        eos = file.integer("tokenizer.ggml.eos_token_id", -1, minimum=-1)
        return TokenizerFiles(None, None, None, () if eos < 0 else (eos,))
    if kind not in ("gpt2", "llama"):
        file.fail("tokenizer.ggml.model", f"{kind!r} is not supported; supported: gpt2, llama")
    vocabulary = _Vocabulary(file, default_ids=(1, 2, 0) if kind == "llama" else (None, None, None))
    pre = _pre_tokenizer(file, vocabulary) if kind == "gpt2" else PreTokenizer(add_bos=True)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        **(_byte_level(file, vocabulary, pre) if kind == "gpt2" else _sentencepiece(file, vocabulary)),
        "post_processor": _post_processor(file, vocabulary, pre.add_bos),
    }
    return TokenizerFiles(tokenizer, vocabulary.config(), vocabulary.bos, vocabulary.ending_ids())


class _Vocabulary:
    """Tokens with their kinds, and the ids with a role. `default_ids`: of BOS, EOS and unknown where the file has none."""

    def __init__(self, file: GGUFFile, default_ids: tuple[int | None, int | None, int | None]) -> None:
        self.file = file
        self.tokens = file.strings("tokenizer.ggml.tokens")
        if "tokenizer.ggml.token_type" in file.metadata:
            self.kinds = file.integers("tokenizer.ggml.token_type")
        else:
            self.kinds = [_NORMAL] * len(self.tokens)
        if len(self.kinds) != len(self.tokens):
            file.fail("tokenizer.ggml.token_type", f"has {len(self.kinds)} entries for {len(self.tokens)} tokens")
        self.ids: dict[str, int] = {}
        for token_id, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            if kind != _UNUSED or _PADDING.fullmatch(token) is None:
                self.ids.setdefault(token, token_id)
        self.bos = self.role("bos", default_ids[0])
        self.eos = self.role("eos", default_ids[1])
        self.unknown = self.role("unknown", default_ids[2])

    def role(self, name: str, default: int | None = None) -> int | None:
        """The id with a role, None when it has none or, as old files say it, one beyond the vocabulary."""
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = default if key not in self.file.metadata else self._id_value(key)
        return token_id if token_id is not None and token_id < len(self.tokens) else None

    def _id_value(self, key: str) -> int | None:
        # "No token" is -1, kept in an unsigned number.
        if self.file.metadata[key] in (-1, 2**32 - 1):
            return None
        return self.file.integer(key)

    def is_added(self, token_id: int) -> bool:
        """True for a token that is found in text before anything else. SentencePiece's own whitespace tokens are not."""
        kind, text = self.kinds[token_id], self.tokens[token_id]
        is_control = kind in (_CONTROL, _UNKNOWN)
        return (
            text != ""
            and self.ids.get(text) == token_id
            and (is_control or (kind == _USER_DEFINED and _SPACE not in text))
        )

    def added_tokens(self) -> list[dict[str, Any]]:
        return [
            {
                "id": token_id,
                "content": self.tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": self.kinds[token_id] != _USER_DEFINED,
            }
            for token_id in range(len(self.tokens))
            if self.is_added(token_id)
        ]

    def ending_ids(self) -> tuple[int, ...]:
        """EOS, end of turn, end of message, and what is known by its text to end an answer."""
        named = [self.eos, self.role("eot"), self.role("eom")]
        known = [self.ids[text] for text in sorted(_END_TEXTS & self.ids.keys()) if self.is_added(self.ids[text])]
        return tuple(dict.fromkeys(token_id for token_id in (*named, *known) if token_id is not None))

    def config(self) -> dict[str, Any]:
        """The object of tokenizer_config.json."""
        roles = {"bos": self.bos, "eos": self.eos, "unk": self.unknown, "pad": self.role("padding")}
        config: dict[str, Any] = {
            f"{name}_token": self.tokens[token_id] for name, token_id in roles.items() if token_id is not None
        }
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if "tokenizer.chat_template" in self.file.metadata:
            config["chat_template"] = self.file.string("tokenizer.chat_template")
        return config


def _pre_tokenizer(file: GGUFFile, vocabulary: _Vocabulary) -> PreTokenizer:
    name = file.string("tokenizer.ggml.pre", "default")
    # Files from before the key was invented: the architecture tells what it would be.
    if name == "default" and file.string("general.architecture") in ("qwen2", "qwen3"):
        name = "qwen2"
    elif name == "default" and "<|begin_of_text|>" in vocabulary.ids:
        name = "llama-bpe"
    if name not in PRE_TOKENIZERS:
        file.fail("tokenizer.ggml.pre", f"{name!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def _byte_level(file: GGUFFile, vocabulary: _Vocabulary, pre: PreTokenizer) -> dict[str, Any]:
    merges = []
    for index, merge in enumerate(file.strings("tokenizer.ggml.merges", [])):
        # No token is empty, so the blank between the two is never the first character.
        left, right = merge[:1] + merge[1:].partition(" ")[0], merge[1:].partition(" ")[2]
        if left not in vocabulary.ids or right not in vocabulary.ids or left + right not in vocabulary.ids:
            file.fail(
                "tokenizer.ggml.merges",
                f"entry {index}, {merge[:60]!r}, names a token that the vocabulary does not have",
            )
        merges.append([left, right])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre.gpt2}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    return {
        "normalizer": {"type": "NFC"} if pre.normalize else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]} if splits else byte_level,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=pre.ignore_merges),
    }


def _sentencepiece(file: GGUFFile, vocabulary: _Vocabulary) -> dict[str, Any]:
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        file.fail("tokenizer.ggml.scores", f"has {len(scores)} entries for {len(vocabulary.tokens)} tokens")
    if not all(map(math.isfinite, scores)):
        file.fail("tokenizer.ggml.scores", "holds a score that is no number")
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoder: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if file.boolean("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _bpe(vocabulary, _merges_from_scores(vocabulary, scores), byte_fallback=True)
    if vocabulary.unknown is not None:
        model |= {"unk_token": vocabulary.tokens[vocabulary.unknown], "fuse_unk": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": model,
    }


def _merges_from_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[list[str]]:
    """Every way to make a token from two others, best score first: SentencePiece merges the pair whose token has the best score.

    Of the ways to make one token, the one with the longer left part comes first, as in transformers' converter.
    """
    mergeable = {
        token: token_id
        for token, token_id in vocabulary.ids.items()
        if vocabulary.kinds[token_id] in (_NORMAL, _USER_DEFINED) and not vocabulary.is_added(token_id)
    }
    ranked = []
    for token, token_id in mergeable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[token_id], -cut, token_id, left, right))
    return [[left, right] for _, _, _, left, right in sorted(ranked)]


def _bpe(
    vocabulary: _Vocabulary, merges: list[list[str]], *, ignore_merges: bool = False, byte_fallback: bool = False
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _post_processor(file: GGUFFile, vocabulary: _Vocabulary, add_bos: bool) -> dict[str, Any] | None:
    """What stands around a text: BOS and EOS, each if the file asks for it."""
    before, after = [], []
    if vocabulary.bos is not None and file.boolean("tokenizer.ggml.add_bos_token", add_bos):
        before = [vocabulary.bos]
    if vocabulary.eos is not None and file.boolean("tokenizer.ggml.add_eos_token", False):
        after = [vocabulary.eos]
    if not before and not after:
        return None

    def pieces(name: str, type_id: int) -> list[dict[str, Any]]:
        def special(ids: list[int]) -> list[dict[str, Any]]:
            return [{"SpecialToken": {"id": vocabulary.tokens[token_id], "type_id": type_id}} for token_id in ids]

        return [*special(before), {"Sequence": {"id": name, "type_id": type_id}}, *special(after)]

    texts = {vocabulary.tokens[token_id]: token_id for token_id in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": pieces("A", 0),
        "pair": [*pieces("A", 0), *pieces("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]} for text, token_id in texts.items()},
    }
