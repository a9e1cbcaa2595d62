"""How byte-level BPE tokenizers cut text before merging, by the names that GGUF's `tokenizer.ggml.pre` gives them.

Names are those that llama.cpp's converter writes (get_vocab_base_pre in convert_hf_to_gguf.py), expressions those of the models'
own tokenizer.json files. The expressions apply one after the other, each to the pieces of the one before; GPT-2's is built into the
`tokenizers` library and comes last where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`patterns`: expressions whose matches become pieces of their own. `gpt2`: GPT-2's expression follows. `ignore_merges`: a piece
    that is a token is taken as it is. `normalize`: text is brought to Unicode's form C first. `add_bos`: unless the file says otherwise."""

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    ignore_merges: bool = False
    normalize: bool = False
    add_bos: bool = False


_GPT2_FAMILY = PreTokenizer(gpt2=True)
_DIGITS_FAMILY = PreTokenizer((r"\p{N}",), gpt2=True)
_LLAMA3_FAMILY = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_FAMILY = PreTokenizer((_QWEN2,))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    # What llama.cpp takes where a file names none. GPT-2's expression stands in the middle and so has to be spelt out.
    "default": PreTokenizer(
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            "[0-9][0-9][0-9]",
        )
    ),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "a.x-4.0"), _GPT2_FAMILY),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGITS_FAMILY
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), _LLAMA3_FAMILY),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    "qwen2": PreTokenizer((_QWEN2,), normalize=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "kormo", "stablelm2"), _QWEN2_FAMILY),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
}
