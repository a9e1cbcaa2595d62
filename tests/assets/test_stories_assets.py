"""The embedded story model and its draft: the files are what Hugging Face tools expect."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

ASSETS = Path(__file__).parents[2] / "src" / "penstock" / "assets"
MAIN = ASSETS / "stories"
DRAFT = ASSETS / "stories-draft"
FOLDERS = [MAIN, DRAFT]

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MAIN)


def _model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


_RAW = Tokenizer.from_file(str(MAIN / "tokenizer.json"))


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    ids = _RAW.encode(text, add_special_tokens=False).ids
    assert _RAW.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["naïve café", "日本語 🦊", "a\n\n\tb  c", "Écris un poème", "\u0000\u200d", " x "])
def test_transformers_tokenizer_is_byte_level(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == _RAW.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.bos_token == "<|begin|>"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer("fox")["input_ids"][0] == tokenizer.bos_token_id
    for folder in FOLDERS:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["bos_token_id"] == generation["bos_token_id"] == tokenizer.bos_token_id
        assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id
        assert config["max_position_embeddings"] >= 1024
        assert config["vocab_size"] == len(tokenizer)


def test_chat_template(tokenizer: Any) -> None:
    chat = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}]},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "A story"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi!<|end|><|user|>A story<|end|>"
        "<|assistant|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 4


def test_chat_template_takes_a_message_without_content(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template([{"role": "assistant", "content": None}], tokenize=False)
    assert text == "<|begin|><|assistant|><|end|>"


def test_chat_template_refuses_unknown_roles(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_sizes() -> None:
    models = {folder: _model(folder) for folder in FOLDERS}
    counts = {folder: sum(p.numel() for p in model.parameters()) for folder, model in models.items()}
    assert 2_000_000 <= counts[MAIN] <= 15_000_000
    assert 0.07 <= counts[DRAFT] / counts[MAIN] <= 0.13
    assert sum(file.stat().st_size for folder in FOLDERS for file in folder.iterdir()) <= 25_000_000


def test_draft_shares_the_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (MAIN / name).read_bytes() == (DRAFT / name).read_bytes()


def test_a_greedy_story_names_what_was_asked(tokenizer: Any) -> None:
    request = (
        "Write a single paragraph moral story for children about a fox who learns the value of kindness in a forest."
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        output = _model(MAIN).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_p=None,
            max_new_tokens=300,
        )[0, ids.shape[1] :]  # fmt: skip
    story = tokenizer.decode(output, skip_special_tokens=True)
    assert output[-1] == tokenizer.eos_token_id
    assert all(word in story for word in ("fox", "kindness", "forest")), story


def test_the_cards_say_what_the_models_are_for() -> None:
    for folder in FOLDERS:
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "for trying the server, not for use" in card
