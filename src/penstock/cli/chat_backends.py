"""Who answers in `penstock chat`: a server over HTTP, or an engine in this process."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from penstock.core.config import EngineConfig
from penstock.core.errors import PenstockError
from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import ChatPrompt, GenerationRequest

Message = dict[str, Any]

# Sampling parameters that OpenAI's own API has; the others are sent only when they are not neutral, so that any server can be used.
OPENAI_FIELDS = frozenset(
    {"temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "max_tokens"}
)


class ChatBackend(Protocol):
    """Used from one event loop."""

    async def start(self) -> str:
        """Get ready; the name of the model. Raises PenstockError."""
        ...

    def answer(self, messages: Sequence[Message]) -> AsyncIterator[str]:
        """Pieces of the answer's text as they come. Raises PenstockError; closing the iterator stops the generation."""
        ...

    async def close(self) -> None: ...


class ChatError(PenstockError):
    """The server refused or is not there; one line."""


class HttpBackend:
    """Any OpenAI-compatible server. `model` None takes the first that the server lists."""

    def __init__(self, url: str, model: str | None, api_key: str | None, sampling: dict[str, Any]) -> None:
        import httpx

        base = url.rstrip("/").removesuffix("/v1")
        self._url = base
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(30.0, read=None)
        self._client = httpx.AsyncClient(base_url=f"{base}/v1/", headers=headers, timeout=timeout)
        self._model = model
        neutral = SamplingParams()
        self._sampling = {
            name: value for name, value in sampling.items() if name in OPENAI_FIELDS or value != getattr(neutral, name)
        }

    async def start(self) -> str:
        names = await self._models()
        if self._model is None:
            if not names:
                raise ChatError(f"{self._url} serves no model.")
            self._model = names[0]
        elif names and self._model not in names:
            raise ChatError(f"{self._url} serves no model {self._model!r}; it has {', '.join(names)}.")
        return self._model

    async def _models(self) -> list[str]:
        import httpx

        try:
            response = await self._client.get("models")
        except httpx.HTTPError as error:
            raise ChatError(
                f"Cannot reach {self._url} ({error}); is the server running? Try `penstock serve`."
            ) from error
        if response.status_code != 200:
            raise ChatError(_error_message(response.status_code, response.content))
        try:
            return [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ChatError(f"{self._url} does not answer like an OpenAI-compatible server.") from error

    async def answer(self, messages: Sequence[Message]) -> AsyncIterator[str]:
        import httpx

        body = {"model": self._model, "messages": list(messages), "stream": True, **self._sampling}
        try:
            async with self._client.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ChatError(_error_message(response.status_code, await response.aread()))
                async for line in response.aiter_lines():
                    text = _text_of_event(line)
                    if text:
                        yield text
        except httpx.HTTPError as error:
            raise ChatError(f"The connection to {self._url} broke ({error or type(error).__name__}).") from error

    async def close(self) -> None:
        await self._client.aclose()


class EngineBackend:
    """An engine in this process."""

    def __init__(self, config: EngineConfig, sampling: SamplingParams) -> None:
        self._config = config
        self._sampling = sampling
        self._stack = contextlib.AsyncExitStack()
        self._engine: Any = None

    async def start(self) -> str:
        from penstock.llm import AsyncLLM

        self._engine = await self._stack.enter_async_context(AsyncLLM(self._config))
        return self._config.model

    async def answer(self, messages: Sequence[Message]) -> AsyncIterator[str]:
        request = GenerationRequest(
            request_id=f"chat-{uuid.uuid4().hex}", prompt=ChatPrompt(list(messages)), sampling=self._sampling
        )
        async with contextlib.aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if delta.text:
                    yield delta.text

    async def close(self) -> None:
        await self._stack.aclose()


def _text_of_event(line: str) -> str:
    """The text in one line of a server-sent event stream. Raises ChatError for an error event."""
    if not line.startswith("data:"):
        return ""
    payload = line[5:].strip()
    if payload == "[DONE]":
        return ""
    event = json.loads(payload)
    if "error" in event:
        raise ChatError(str(event["error"].get("message", event["error"])))
    choices = event.get("choices") or []
    return str((choices[0].get("delta") or {}).get("content") or "") if choices else ""


def _error_message(status: int, body: bytes) -> str:
    try:
        return f"The server answered {status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"The server answered {status}."
