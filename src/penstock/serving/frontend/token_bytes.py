"""The bytes that each token adds to the text, where the decoder of a tokenizer works token by token.

Almost all tokenizers do: byte-level BPE (GPT-2, Llama 3, Qwen) maps every character of a token to one byte; SentencePiece style
(Llama 2, Mistral) writes "▁" for a space and <0xNN> for a byte, and drops one space at the very start of the text. Bytes make the
rest easy: text is the concatenation of its tokens' bytes, decoded as UTF-8.

`TokenWindow` covers any other decoder by decoding a window of tokens again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Rule = Callable[[str], bytes]


class TokenBytes:
    """Bytes per token id, computed once each.

    `exact`: concatenated bytes are the text (else use `decode_window`). `strip_start`: one leading space is dropped where a text
    starts.
    """

    def __init__(self, backend: tokenizers.Tokenizer, rule: Rule | None, *, strip_start: bool) -> None:
        self._backend = backend
        self._rule = rule
        self.exact = rule is not None
        self.strip_start = strip_start
        self._cache: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._compute(token_id)
        return found

    def _compute(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._rule is not None:
            return self._rule(token)
        return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()

    def decode_window(self, token_ids: list[int]) -> str:
        """Text of a window of tokens, special tokens included."""
        return str(self._backend.decode(token_ids, skip_special_tokens=False))


def make_token_bytes(backend: tokenizers.Tokenizer) -> TokenBytes:
    """Read the tokenizer's decoder and choose the rule for it."""
    decoder = json.loads(backend.to_str())["decoder"]
    steps = flatten_decoder(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenBytes(backend, byte_level_rule(), strip_start=False)
    rule_and_strip = sentencepiece_rule(steps)
    if rule_and_strip is not None:
        rule, strip_start = rule_and_strip
        return TokenBytes(backend, rule, strip_start=strip_start)
    return TokenBytes(backend, None, strip_start=False)


def flatten_decoder(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a decoder as tokenizer.json writes it, nested sequences opened."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in flatten_decoder(inner)]
    return [decoder]


def byte_level_rule() -> Rule:
    """GPT-2's reversible map of 256 printable characters to bytes; a token with any other character stands for itself."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    to_byte = {chr(byte): byte for byte in printable}
    to_byte |= {chr(256 + rank): byte for rank, byte in enumerate(others)}

    def rule(token: str) -> bytes:
        try:
            return bytes([to_byte[char] for char in token])
        except KeyError:
            return token.encode()

    return rule


def sentencepiece_rule(steps: list[dict[str, Any]]) -> tuple[Rule, bool] | None:
    """Rule and `strip_start` for decoders made of Replace, ByteFallback, Fuse, Metaspace and one Strip of the text's first space."""
    replacements: list[tuple[str, str]] = []
    byte_fallback = fused = strip_start = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                replacements.append((old, new))
            case {"type": "ByteFallback"} if not fused:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0} if fused:
                strip_start = strip_start or start == 1
            case {"type": "Metaspace", "replacement": str(old)} if not fused:
                replacements.append((old, " "))
                strip_start = step.get("prepend_scheme", "always") != "never"
            case _:
                return None
    if not steps:
        return None

    def rule(token: str) -> bytes:
        if byte_fallback and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(found[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return rule, strip_start
