"""Prompts to token ids, without stalling the event loop."""

from __future__ import annotations

import asyncio
import logging

from penstock.core.errors import EngineError, InvalidRequestError, ModelFormatError
from penstock.serving.frontend.client import ChatPrompt, Prompt, TextPrompt, TokensPrompt
from penstock.serving.frontend.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Encoding this many characters takes about a millisecond; longer texts go to a thread (`tokenizers` releases the interpreter).
INLINE_CHARS = 4096


class PromptEncoder:
    """Encodes any Prompt; `tokenizer` None takes token ids only."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids, not yet checked against the model. Raises InvalidRequestError."""
        if isinstance(prompt, TokensPrompt):
            return list(prompt.token_ids)
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                "This model has no tokenizer; send the prompt as a list of token ids to /v1/completions.",
                param="messages" if isinstance(prompt, ChatPrompt) else "prompt",
                code="no_tokenizer",
            )
        if isinstance(prompt, TextPrompt):
            if len(prompt.text) <= INLINE_CHARS:
                return tokenizer.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
            return await asyncio.to_thread(tokenizer.encode, prompt.text, add_special_tokens=prompt.add_special_tokens)
        # The template runs in its sandbox process, so this waits for a pipe.
        try:
            return await asyncio.to_thread(
                tokenizer.encode_chat, prompt.messages, add_generation_prompt=prompt.add_generation_prompt
            )
        except ModelFormatError as error:
            logger.error("%s", error)
            raise EngineError("The model's chat template cannot be used.", code="broken_chat_template") from error
