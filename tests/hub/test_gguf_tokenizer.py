"""Tokenizers from GGUF metadata: the same ids as the tokenizers that the metadata was made from."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from gguf import TokenType

from penstock.core.errors import ModelFormatError
from penstock.core.gguf import read_gguf
from penstock.hub.gguf_pretokenizers import PRE_TOKENIZERS
from penstock.hub.gguf_tokenizer import TokenizerFiles, tokenizer_files
from penstock.hub.resolve import embedded_model_folder
from penstock.serving.frontend.tokenizer import Tokenizer
from tests.gguf_files import add_byte_level_tokenizer, write_gguf

TEXTS = (
    "Once upon a time, there was a young hedgehog.",
    "I'm 12345 apples!!\n\n  ok  \t x",
    "Don'T SHOUT'S 3.14159 $100^2 <a+b>=c|d~ `q`",
    "naïve Grüße 世界你好 1２3 😀😀",
    "   leading  and trailing   ",
    "<|user|>hi<|end|> there\r\n\r\nfoo\tbar_baz(){ return x+1; }",
    "",
)
Edit = Callable[[gguf.GGUFWriter], None]


def read_tokenizer(folder: Path, fill: Edit) -> TokenizerFiles:
    path = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tokenizer_files(read_gguf(path))


def frontend(folder: Path, files: TokenizerFiles) -> Tokenizer:
    """What the server reads of it."""
    (folder / "tokenizer.json").write_text(json.dumps(files.tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(files.tokenizer_config))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


# ---- byte-level BPE ----


def test_the_embedded_models_tokenizer_survives(tmp_path: Path) -> None:
    source = embedded_model_folder()
    files = read_tokenizer(tmp_path, lambda writer: add_byte_level_tokenizer(writer, source))
    ours, original = frontend(tmp_path, files), Tokenizer.from_folder(source)
    assert original is not None
    for text in TEXTS:
        ids = original.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == original.decode(ids)
        assert ours.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.encode_chat(messages) == original.encode_chat(messages)
    assert (ours.bos_token_id, ours.eos_token_id) == (original.bos_token_id, original.eos_token_id)
    assert ours.special_token_ids == original.special_token_ids
    assert ours.vocab_size == original.vocab_size
    assert files.eos_token_ids == (2,)
    ours.close()
    original.close()


def test_transformers_reads_the_same_ids_from_the_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(embedded_model_folder(), tmp_path / "stories.gguf")
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="stories.gguf")
    ours = frontend(tmp_path, tokenizer_files(read_gguf(tmp_path / "stories.gguf")))
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text)
        assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text), skip_special_tokens=True)


def test_padding_of_the_vocabulary_has_no_text(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        add_tokens(writer, [("a", TokenType.NORMAL), ("[PAD1]", TokenType.UNUSED), ("<unused>", TokenType.UNUSED)])

    tokenizer = frontend(tmp_path, read_tokenizer(tmp_path, fill))
    assert tokenizer.decode([0, 1, 2]) == "a<unused>"


def add_tokens(writer: gguf.GGUFWriter, tokens: list[tuple[str, TokenType]], pre: str = "gpt-2") -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])


GPT2_PIECES = ["I", "'m", " 12345", " Apples", "!!", "\n\n ", " ok", "\t", "x"]
LLAMA3_PIECES = ["I", "'m", " ", "123", "45", " Apples", "!!\n\n", " ", " ok", "\tx"]
QWEN2_PIECES = ["I", "'m", " ", "1", "2", "3", "4", "5", " Apples", "!!\n\n", " ", " ok", "\tx"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", GPT2_PIECES),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " Apples", "!!", "\n\n ", " ok", "\t", "x"]),
        ("llama-bpe", LLAMA3_PIECES),
        ("smaug-bpe", LLAMA3_PIECES),
        ("qwen2", QWEN2_PIECES),
        ("deepseek-r1-qwen", QWEN2_PIECES),
        ("tekken", ["I", "'m", " ", "1", "2", "3", "4", "5", " Apples", "!!\n\n", " ", " ok", "\tx"]),
        (
            "deepseek-coder",
            ["I", "'", "m", " ", "1", "2", "3", "4", "5", " Apples", "!!", "\n", "\n", " ", " ok", "\tx"],
        ),
        ("default", ["I", "'", "m", " ", "123", "45", " Apples", "!!", "\n\n ", " ok", "\t", "x"]),
    ],
)
def test_text_is_cut_as_the_models_own_tokenizers_cut_it(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    assert cut(tmp_path, pre, "I'm 12345 Apples!!\n\n  ok\tx") == pieces


def test_contractions_and_case(tmp_path: Path) -> None:
    assert cut(tmp_path, "gpt-2", "WE'LL") == ["WE", "'", "LL"]
    assert cut(tmp_path, "qwen2", "WE'LL") == ["WE", "'LL"]
    assert cut(tmp_path, "tekken", "camelCaseWORDS") == ["camel", "Case", "WORDS"]


def cut(folder: Path, pre: str, text: str) -> list[str]:
    """The pieces that are merged apart from each other."""
    files = read_tokenizer(folder, lambda writer: add_tokens(writer, [("a", TokenType.NORMAL)], pre))
    backend = tokenizers.Tokenizer.from_str(json.dumps(files.tokenizer))
    decoder = tokenizers.decoders.ByteLevel()
    return [decoder.decode([piece]) for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_expression_compiles_and_loses_nothing(tmp_path: Path, pre: str) -> None:
    for text in TEXTS:
        assert "".join(cut(tmp_path, pre, text)) == text


@pytest.mark.parametrize(
    ("architecture", "tokens", "expected"),
    [
        ("qwen2", ["a"], "qwen2"),
        ("qwen3", ["a"], "qwen2"),
        ("llama", ["<|begin_of_text|>"], "llama-bpe"),
        ("llama", ["a"], "default"),
    ],
)
def test_a_file_that_names_no_pretokenizer(tmp_path: Path, architecture: str, tokens: list[str], expected: str) -> None:
    def fill(writer: gguf.GGUFWriter, pre: str | None) -> None:
        writer.kv_data[0].pop("general.architecture")
        writer.add_string("general.architecture", architecture)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        if pre is not None:
            writer.add_tokenizer_pre(pre)

    without = read_tokenizer(tmp_path, lambda writer: fill(writer, None))
    assert without == read_tokenizer(tmp_path, lambda writer: fill(writer, "default"))
    assert without == read_tokenizer(tmp_path, lambda writer: fill(writer, expected))


def test_qwen_normalises_and_llama_takes_whole_words(tmp_path: Path) -> None:
    tokens = [("Ã©", TokenType.NORMAL), ("Ã", TokenType.NORMAL), ("©", TokenType.NORMAL)]
    qwen = frontend(tmp_path, read_tokenizer(tmp_path, lambda writer: add_tokens(writer, tokens, "qwen2")))
    # e and a combining accent are one character, whose two bytes no merge joins.
    assert qwen.encode("e\u0301") == [1, 2]
    llama = frontend(tmp_path, read_tokenizer(tmp_path, lambda writer: add_tokens(writer, tokens, "llama-bpe")))
    assert llama.encode("é") == [0]


def test_bos_and_eos_around_a_text(tmp_path: Path) -> None:
    tokens = [("a", TokenType.NORMAL), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]

    def encode(pre: str, **flags: bool) -> list[int]:
        def fill(writer: gguf.GGUFWriter) -> None:
            add_tokens(writer, tokens, pre)
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            for name, value in flags.items():
                writer.add_bool(f"tokenizer.ggml.{name}", value)

        return frontend(tmp_path, read_tokenizer(tmp_path, fill)).encode("a")

    assert encode("gpt-2") == [0]
    assert encode("llama-bpe") == [1, 0]
    assert encode("llama-bpe", add_bos_token=False) == [0]
    assert encode("gpt-2", add_bos_token=True) == [1, 0]
    assert encode("gpt-2", add_bos_token=True, add_eos_token=True) == [1, 0, 2]
    assert encode("gpt-2", add_eos_token=True) == [0, 2]


def test_tokens_that_end_an_answer(tmp_path: Path) -> None:
    texts = ["a", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eom_id|>", "<turn>", "<|eot_id|>"]
    kinds = [TokenType.NORMAL, *[TokenType.CONTROL] * 5, TokenType.NORMAL]

    def fill(writer: gguf.GGUFWriter) -> None:
        add_tokens(writer, list(zip(texts, kinds, strict=True)), "qwen2")
        writer.add_eos_token_id(3)
        writer.add_eot_token_id(5)
        writer.add_pad_token_id(2**32 - 1)
        writer.add_bos_token_id(99)

    files = read_tokenizer(tmp_path, fill)
    # EOS first, then what the file names, then what the texts say; a token that is ordinary text never ends anything.
    assert files.eos_token_ids == (3, 5, 1, 4)
    assert files.bos_token_id is None
    assert files.tokenizer_config is not None
    assert "pad_token" not in files.tokenizer_config
    assert "chat_template" not in files.tokenizer_config


def test_user_defined_tokens_are_found_but_not_hidden(tmp_path: Path) -> None:
    tokens = [("a", TokenType.NORMAL), ("<tool>", TokenType.USER_DEFINED), ("<s>", TokenType.CONTROL)]
    tokenizer = frontend(tmp_path, read_tokenizer(tmp_path, lambda writer: add_tokens(writer, tokens)))
    assert tokenizer.encode("a<tool>a<s>") == [0, 1, 0, 2]
    assert tokenizer.decode([0, 1, 0, 2]) == "a<tool>a"


# ---- SentencePiece ----

TRAINING_TEXT = (
    "the quick brown fox jumps over the lazy dog and then the other quick foxes jump over other lazy dogs too "
    "when there is nothing there the thinker thinks these things through with another thought or other thing "
) * 3


def sentencepiece_vocabulary() -> list[tuple[str, float, TokenType]]:
    """Pieces in the order in which they were learnt, scored as SentencePiece scores them, after the special and byte tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=160, show_progress=False)
    words = ["▁" + word for word in TRAINING_TEXT.split()]
    backend.train_from_iterator(words, trainer)
    data = json.loads(backend.to_str())["model"]
    learnt = ["".join(merge) for merge in data["merges"]]
    characters = [token for token in data["vocab"] if len(token) == 1]
    pieces = [*dict.fromkeys(learnt), *characters]
    return [
        ("<unk>", 0.0, TokenType.UNKNOWN),
        ("<s>", 0.0, TokenType.CONTROL),
        ("</s>", 0.0, TokenType.CONTROL),
        *((f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)),
        *((piece, -float(rank), TokenType.NORMAL) for rank, piece in enumerate(pieces)),
    ]


def add_sentencepiece(writer: gguf.GGUFWriter, vocabulary: list[tuple[str, float, TokenType]]) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in vocabulary])
    writer.add_token_scores([score for _, score, _ in vocabulary])
    writer.add_token_types([kind for _, _, kind in vocabulary])


def best_score_first(text: str, vocabulary: list[tuple[str, float, TokenType]]) -> list[int]:
    """SentencePiece's algorithm in its plainest form: join the neighbours that make the token with the best score, leftmost first."""
    ids = {piece: token_id for token_id, (piece, _, kind) in enumerate(vocabulary) if kind is TokenType.NORMAL}
    pieces = list(("▁" + text).replace(" ", "▁"))
    while True:
        joins = [
            (-vocabulary[ids[left + right]][1], index)
            for index, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in ids
        ]
        if not joins:
            break
        index = min(joins)[1]
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
    encoded: list[int] = []
    for piece in pieces:
        encoded += [ids[piece]] if piece in ids else [3 + byte for byte in piece.encode()]
    return encoded


def test_sentencepiece_merges_the_best_score_first(tmp_path: Path) -> None:
    vocabulary = sentencepiece_vocabulary()
    tokenizer = frontend(tmp_path, read_tokenizer(tmp_path, lambda writer: add_sentencepiece(writer, vocabulary)))
    generator = random.Random(0)
    letters = sorted({*TRAINING_TEXT, "é", "世", "\n", "Q"})
    words = TRAINING_TEXT.split()
    texts = ["the others thought", "  two  blanks ", "Grüße, 世界!\n", *TEXTS[:3]]
    texts += ["".join(generator.choices(letters, k=30)) for _ in range(100)]
    texts += [" ".join(generator.choices(words, k=8)) for _ in range(100)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == [1, *best_score_first(text, vocabulary)], text
        assert tokenizer.decode(ids) == text
    assert max(len(tokenizer.encode(word)) for word in words) < 6, "merges take place at all"


def test_sentencepiece_without_the_leading_blank(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        add_sentencepiece(writer, sentencepiece_vocabulary())
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(False)

    tokenizer = frontend(tmp_path, read_tokenizer(tmp_path, fill))
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert tokenizer.encode("the")[0] != tokenizer.encode(" the")[0]
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2


def test_pieces_of_blanks_are_pieces_not_markers(tmp_path: Path) -> None:
    """Some converters mark SentencePiece's runs of blanks as the user's own tokens."""
    vocabulary = [*sentencepiece_vocabulary(), ("▁▁", -1000.0, TokenType.USER_DEFINED)]
    tokenizer = frontend(tmp_path, read_tokenizer(tmp_path, lambda writer: add_sentencepiece(writer, vocabulary)))
    assert tokenizer.encode(" ")[1:] == [len(vocabulary) - 1]
    assert tokenizer.decode([1, len(vocabulary) - 1]) == " "


# ---- refused ----


def remove(writer: gguf.GGUFWriter, key: str) -> None:
    writer.kv_data[0].pop(key)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda writer: replace(writer, writer.add_tokenizer_model, "t5"),
            "tokenizer.ggml.model: 't5' is not supported",
        ),
        (
            lambda writer: replace(writer, writer.add_tokenizer_pre, "new"),
            "tokenizer.ggml.pre: 'new' is not supported; supp",
        ),
        (lambda writer: remove(writer, "tokenizer.ggml.tokens"), "tokenizer.ggml.tokens: is missing"),
        (
            lambda writer: replace(writer, writer.add_token_types, [1]),
            "tokenizer.ggml.token_type: has 1 entries for 2 tokens",
        ),
        (
            lambda writer: writer.add_token_merges(["a b", "a c"]),
            "tokenizer.ggml.merges: entry 0, 'a b', names a token",
        ),
        (lambda writer: writer.add_token_merges(["a"]), "tokenizer.ggml.merges: entry 0, 'a', names a token"),
        (lambda writer: writer.add_string("tokenizer.ggml.bos_token_id", "x"), "bos_token_id: must be an integer"),
        (
            lambda writer: writer.add_array("tokenizer.chat_template", ["x"]),
            "tokenizer.chat_template: must be a string",
        ),
        (lambda writer: replace(writer, writer.add_tokenizer_model, "llama"), "tokenizer.ggml.scores: is missing"),
    ],
)
def test_what_cannot_be_used_is_refused_by_key(tmp_path: Path, edit: Any, message: str) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        add_tokens(writer, [("a", TokenType.NORMAL), ("b", TokenType.NORMAL)])
        edit(writer)

    with pytest.raises(ModelFormatError, match=rf"vocabulary\.gguf: .*{message}"):
        read_tokenizer(tmp_path, fill)


def replace(writer: gguf.GGUFWriter, add: Callable[[Any], None], value: Any) -> None:
    key = {
        "add_tokenizer_model": gguf.Keys.Tokenizer.MODEL,
        "add_tokenizer_pre": gguf.Keys.Tokenizer.PRE,
        "add_token_types": gguf.Keys.Tokenizer.TOKEN_TYPE,
    }[add.__name__]
    remove(writer, key)
    add(value)


def test_scores_have_to_be_numbers_for_all_tokens(tmp_path: Path) -> None:
    for scores, message in (([0.0, 1.0], "has 2 entries for 3 tokens"), ([0.0, float("nan"), 0.0], "no number")):

        def fill(writer: gguf.GGUFWriter, scores: list[float] = scores) -> None:
            writer.add_tokenizer_model("llama")
            writer.add_token_list(["<unk>", "<s>", "</s>"])
            writer.add_token_scores(scores)

        with pytest.raises(ModelFormatError, match=rf"tokenizer\.ggml\.scores: .*{message}"):
            read_tokenizer(tmp_path, fill)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path, lambda writer: None) == TokenizerFiles(None, None, None, ())
    files = read_tokenizer(tmp_path, lambda writer: writer.add_eos_token_id(5))
    assert files.eos_token_ids == (5,)
