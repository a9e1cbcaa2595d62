"""Reading a model folder's tokenizer files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from penstock.core.errors import InvalidRequestError, ModelFormatError
from penstock.serving.frontend.tokenizer import Tokenizer


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def test_special_tokens_and_hashes_come_from_the_folder(byte_level: Tokenizer, byte_level_folder: Path) -> None:
    assert byte_level.special_tokens == {"bos_token": "<s>", "eos_token": "<|end|>"}
    assert byte_level.bos_token_id == 0
    assert byte_level.eos_token_id == 1
    assert byte_level.special_token_ids == frozenset({0, 1, 2, 3})
    assert byte_level.tokenizer_hash == hashlib.sha256((byte_level_folder / "tokenizer.json").read_bytes()).hexdigest()
    template = (byte_level_folder / "chat_template.jinja").read_bytes()
    assert byte_level.template_hash == hashlib.sha256(template).hexdigest()
    assert byte_level.decode([byte_level.vocab_size - 1]) == "plain added"
    assert byte_level.decode([byte_level.vocab_size]) == ""


@pytest.mark.parametrize("text", ["hello world", "héllo 🙂 日本語", "plain added text", "", " lead", "tab\tand\nline"])
def test_text_survives_the_round_trip(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    assert byte_level.decode(ids) == text


def test_the_post_processor_decides_about_bos(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.encode("hello")[0] == byte_level.bos_token_id
    assert byte_level.bos_token_id not in byte_level.encode("hello", add_special_tokens=False)
    # This tokenizer names a BOS token, but its tokenizer.json does not add it.
    assert sentencepiece.bos_token_id not in sentencepiece.encode("hello")


def test_special_tokens_can_be_shown(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("hello")
    assert byte_level.decode(ids) == "hello"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<s>hello"


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


def test_a_broken_tokenizer_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_broken_config_names_the_file(byte_level_folder: Path, tmp_path: Path) -> None:
    folder = copy(byte_level_folder, tmp_path)
    (folder / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ModelFormatError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(folder)


def test_an_unpaired_surrogate_is_the_clients_fault(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        byte_level.encode("a\ud800b")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("from config", "from config"),
        ([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}], "d"),
        ([{"name": "only", "template": "o"}], "o"),
    ],
)
def test_older_folders_keep_the_template_in_the_config(
    byte_level_folder: Path, tmp_path: Path, value: object, expected: str
) -> None:
    folder = copy(byte_level_folder, tmp_path)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.source == expected


def test_several_templates_without_a_default_are_refused(byte_level_folder: Path, tmp_path: Path) -> None:
    folder = copy(byte_level_folder, tmp_path)
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "a", "template": "a"}, {"name": "b", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    with pytest.raises(ModelFormatError, match="default"):
        Tokenizer.from_folder(folder)


def test_names_of_special_tokens_in_the_map_of_older_folders(byte_level_folder: Path, tmp_path: Path) -> None:
    folder = copy(byte_level_folder, tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    assert tokenizer.eos_token_id == 1
    assert tokenizer.bos_token_id is None


def test_chat_goes_through_the_template_and_adds_no_second_bos(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_chat([{"role": "user", "content": "hello"}])
    assert byte_level.decode(ids, skip_special_tokens=False) == "<s><|user|>hello<|end|><|assistant|>"
    assert ids.count(0) == 1
    byte_level.close()


def test_chat_without_a_template_is_refused(sentencepiece: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sentencepiece.encode_chat([{"role": "user", "content": "hello"}])
    assert caught.value.param == "messages"
    assert sentencepiece.template_hash == ""


def test_agrees_with_transformers(byte_level_folder: Path, byte_level: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(byte_level_folder))
    messages = [{"role": "user", "content": "hello wörld 🙂"}, {"role": "assistant", "content": "the fox"}]
    for text in ["hello world", "héllo 🙂", "plain added", "<|user|>x"]:
        assert byte_level.encode(text) == reference(text)["input_ids"]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert byte_level.encode_chat(messages) == expected
    byte_level.close()
