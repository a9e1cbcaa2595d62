"""Text to token ids and back, through `tokenizers`, from the files of a Hugging Face model folder.

tokenizer.json            vocabulary, merges, normaliser, post-processor (which alone decides about BOS), decoder
tokenizer_config.json     names of the special tokens; in older folders the chat template, or a list of named ones
special_tokens_map.json   the same names in older folders
chat_template.jinja       the chat template in newer folders; wins over tokenizer_config.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from penstock.core.errors import InvalidRequestError, ModelFormatError
from penstock.serving.frontend.chat_template import ChatTemplate
from penstock.serving.frontend.token_bytes import TokenBytes, make_token_bytes

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer and chat template.

    `bos_token_id` and `eos_token_id` are None where the model has none. `special_token_ids` are hidden from text by default.
    `vocab_size` is one more than the highest id. `tokenizer_hash` and `template_hash` are SHA-256 of tokenizer.json and of the
    template's text ("" without a template): equal hashes, equal token ids. Thread-safe.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, special_tokens: dict[str, str], template: str | None, content_hash: str
    ) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = special_tokens
        self.chat_template = ChatTemplate(template, special_tokens) if template is not None else None
        self.tokenizer_hash = content_hash
        self.template_hash = hashlib.sha256(template.encode()).hexdigest() if template is not None else ""
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.token_bytes: TokenBytes = make_token_bytes(backend)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer | None:
        """The tokenizer in a model folder; None when there is no tokenizer.json. Raises ModelFormatError for broken files."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        content = file.read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        # The library raises bare Exception for whatever is wrong with the file.
        except Exception as error:
            raise ModelFormatError(f"{file} cannot be read as a tokenizer: {error}") from error
        config = read_json_object(folder / "tokenizer_config.json")
        names = read_json_object(folder / "special_tokens_map.json")
        special_tokens = {}
        for name in SPECIAL_TOKEN_NAMES:
            text = token_text(config.get(name)) or token_text(names.get(name))
            if text is not None:
                special_tokens[name] = text
        return cls(
            backend,
            special_tokens=special_tokens,
            template=read_template(folder, config),
            content_hash=hashlib.sha256(content).hexdigest(),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; BOS and the like as the tokenizer's post-processor adds them."""
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        # What the library says to a string that has no UTF-8 form.
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequestError(
                "The prompt contains an unpaired surrogate, which is no valid Unicode text.", param="prompt"
            ) from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids without a token (a padded vocabulary) have no text."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def render_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation. Blocks (bounded). Raises InvalidRequestError, also without a template."""
        if self.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
            )
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation. The template writes BOS itself, so no special tokens are added."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def warm_up(self) -> None:
        """Start the template's sandbox and compile the template. Raises ModelFormatError when the template is broken."""
        if self.chat_template is not None:
            self.chat_template.check()

    def close(self) -> None:
        """Stop the template's sandbox. Idempotent."""
        if self.chat_template is not None:
            self.chat_template.close()

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when the file is missing. Raises ModelFormatError for anything else."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{file} must hold a JSON object.")
    return value


def token_text(value: Any) -> str | None:
    """A special token's text: written as a string, or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template of a model folder; of several named ones "default", or the only one. None when there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFormatError(f"{file} cannot be read: {error}") from error
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
        if value is None and named:
            raise ModelFormatError(
                f"{folder / 'tokenizer_config.json'} names several chat templates but none 'default'; "
                "write the one to use into chat_template.jinja."
            )
    if value is not None and not isinstance(value, str):
        raise ModelFormatError(f"chat_template in {folder / 'tokenizer_config.json'} must be text.")
    return value
