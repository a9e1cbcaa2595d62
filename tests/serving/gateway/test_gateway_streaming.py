"""Streams: what comes, when it comes, and what happens when one side stops."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from penstock.core.config import ServerConfig
from penstock.core.errors import EngineError
from penstock.serving.gateway.streaming.delta_stream import MAX_PENDING
from penstock.telemetry import metrics
from penstock.testing.fake_client import BOS, Behavior
from penstock.testing.gateway_server import MODEL, GatewayServer

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


def events(http: httpx.Client, path: str = "completions", **fields: Any) -> Iterator[tuple[float, str]]:
    """(seconds since the request, line) of each line that is not empty."""
    body: dict[str, Any] = {"model": MODEL, "stream": True, **fields}
    body.setdefault(
        "messages" if path.startswith("chat") else "prompt", MESSAGES if path.startswith("chat") else "hello"
    )
    started = time.perf_counter()
    with http.stream("POST", f"/v1/{path}", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        for line in response.iter_lines():
            if line:
                yield time.perf_counter() - started, line


def chunks(http: httpx.Client, path: str = "completions", **fields: Any) -> list[dict[str, Any]]:
    """The chunk objects of a stream that ends well."""
    lines = [line for _, line in events(http, path, **fields)]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


@pytest.mark.parametrize("reply", ["hello world", "né🙂 ok", "", "a"])
@pytest.mark.parametrize("interval_s", [0, 0.002])
def test_chat_stream_equals_the_whole_answer(
    server: GatewayServer, api: openai.OpenAI, reply: str, interval_s: float
) -> None:
    server.client.behavior = Behavior(reply=reply, interval_s=interval_s)
    parts = list(api.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, max_tokens=100))
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(part.choices[0].delta.role is None for part in parts[1:])
    assert "".join(part.choices[0].delta.content or "" for part in parts) == reply
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["stop"]
    assert parts[-1].choices[0].finish_reason == "stop"
    assert len({(part.id, part.created, part.model) for part in parts}) == 1


def test_completion_stream(server: GatewayServer, api: openai.OpenAI) -> None:
    server.client.behavior = Behavior(reply="some words", interval_s=0.002)
    parts = list(api.completions.create(model=MODEL, prompt="x", stream=True))
    assert "".join(part.choices[0].text for part in parts) == "some words"
    assert parts[-1].choices[0].finish_reason == "stop"
    assert len(parts) > 1


def test_first_token_comes_at_once_and_later_ones_coalesce(server: GatewayServer, http: httpx.Client) -> None:
    server.client.behavior = Behavior(reply="x" * 60, interval_s=0.001)
    texts = [chunk["choices"][0]["text"] for chunk in chunks(http, max_tokens=100)]
    assert texts[0] == "x"
    assert "".join(texts) == "x" * 60
    assert len(texts) <= 31
    assert max(map(len, texts[1:])) > 2


def test_slow_tokens_are_not_held_back(server: GatewayServer, http: httpx.Client) -> None:
    server.client.behavior = Behavior(reply="abcdef", interval_s=0.03)
    texts = [chunk["choices"][0]["text"] for chunk in chunks(http)]
    assert [text for text in texts if text] == list("abcdef")


def test_coalescing_can_be_switched_off() -> None:
    config = ServerConfig(port=0, stream_coalesce_s=0, drain_timeout_s=1)
    with GatewayServer(config) as server, httpx.Client(base_url=server.url) as http:
        server.client.behavior = Behavior(reply="abcdef", interval_s=0.003)
        texts = [chunk["choices"][0]["text"] for chunk in chunks(http)]
    assert [text for text in texts if text] == list("abcdef")


def test_silence_is_filled_with_pings() -> None:
    config = ServerConfig(port=0, sse_ping_s=0.05, drain_timeout_s=1)
    with GatewayServer(config) as server, httpx.Client(base_url=server.url) as http:
        server.client.behavior = Behavior(reply="ab", first_delay_s=0.18, interval_s=0.12)
        lines = [line for _, line in events(http)]
        api = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
        parts = list(api.completions.create(model=MODEL, prompt="x", stream=True))
        api.close()
    first_data = next(number for number, line in enumerate(lines) if line.startswith("data"))
    assert first_data >= 2
    assert set(lines[:first_data]) == {": ping"}
    assert ": ping" in lines[first_data:]
    assert lines[-1] == "data: [DONE]"
    assert "".join(part.choices[0].text for part in parts) == "ab"


def test_usage_chunk(server: GatewayServer, http: httpx.Client) -> None:
    server.client.behavior = Behavior(reply="abc", num_cached_tokens=2)
    *parts, last = chunks(http, "chat/completions", stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert all(part["usage"] is None for part in parts)


def test_no_usage_unless_asked(http: httpx.Client) -> None:
    assert all("usage" not in part for part in chunks(http))


def test_continuous_usage(server: GatewayServer, http: httpx.Client) -> None:
    server.client.behavior = Behavior(reply="abcd", interval_s=0.02)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = chunks(http, stream_options=options)
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert last["usage"]["completion_tokens"] == 5


def test_samples_and_prompts_interleave(server: GatewayServer, http: httpx.Client) -> None:
    server.client.behavior = Behavior(interval_s=0.005)
    parts = chunks(http, prompt=["abcd", "efgh"], n=2, max_tokens=8)
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    for part in parts:
        (choice,) = part["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"]:
            assert choice["index"] not in finishes
            finishes[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "abcdabcd", 1: "abcdabcd", 2: "efghefgh", 3: "efghefgh"}
    assert finishes == dict.fromkeys(range(4), "length")


def test_every_chat_choice_begins_with_its_role(http: httpx.Client) -> None:
    seen: set[int] = set()
    for part in chunks(http, "chat/completions", n=3, max_tokens=3):
        (choice,) = part["choices"]
        if choice["index"] not in seen:
            seen.add(choice["index"])
            assert choice["delta"] == {"content": "", "role": "assistant"}
    assert seen == {0, 1, 2}


def test_echo_and_logprobs_stream(http: httpx.Client) -> None:
    fields: dict[str, Any] = {
        "prompt": "hé",
        "echo": True,
        "logprobs": 1,
        "n": 2,
        "max_tokens": 3,
        "return_token_ids": True,
    }
    whole = http.post("/v1/completions", json={"model": MODEL, **fields}).json()["choices"]
    for wanted in whole:
        parts = [
            part["choices"][0]
            for part in chunks(http, **fields)
            if part["choices"] and part["choices"][0]["index"] == wanted["index"]
        ]
        assert "".join(part["text"] for part in parts) == wanted["text"]
        assert parts[0]["prompt_token_ids"] == [BOS, *"hé".encode()]
        assert [token for part in parts for token in part["token_ids"]] == wanted["token_ids"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [entry for part in parts for entry in part["logprobs"][name]] == wanted["logprobs"][name]


def test_chat_logprobs_stream(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, logprobs=True, top_logprobs=1, max_tokens=5
    )
    tokens = [
        token.token
        for part in stream
        for token in (part.choices[0].logprobs.content or [] if part.choices[0].logprobs else [])
    ]
    assert "".join(tokens) == "<user"


def test_an_error_before_the_first_token_is_an_http_error(server: GatewayServer, api: openai.OpenAI) -> None:
    server.client.behavior.error = EngineError("The step failed.")
    with pytest.raises(openai.InternalServerError) as caught:
        api.completions.create(model=MODEL, prompt="x", stream=True)
    assert caught.value.code == "engine_error"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineError("The step failed."), "engine_error", "The step failed."),
        (
            RuntimeError("secret path /etc"),
            "internal_error",
            "Internal error. If you report it, please give the request id r-1.",
        ),
    ],
)
def test_an_error_in_the_middle_is_one_event(
    server: GatewayServer, api: openai.OpenAI, http: httpx.Client, error: Exception, code: str, message: str
) -> None:
    server.client.behavior = Behavior(error=error, error_after=3, interval_s=0.005)
    texts: list[str] = []
    stream = api.completions.create(model=MODEL, prompt="abcdef", stream=True, extra_headers={"X-Request-Id": "r-1"})
    with pytest.raises(openai.APIError) as caught:
        texts.extend(part.choices[0].text for part in stream)
    assert "".join(texts) == "abc"
    assert (caught.value.code, caught.value.message) == (code, message)
    lines = [line for _, line in events(http, prompt="abcdef")]
    assert sum('"error"' in line for line in lines) == 1
    assert '"error"' in lines[-1]
    assert "[DONE]" not in "".join(lines)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_aborted_sample_is_never_a_success(server: GatewayServer, api: openai.OpenAI, reason: Any) -> None:
    server.client.behavior = Behavior(reply="abc", finish_reason=reason)
    with pytest.raises(openai.InternalServerError):
        api.completions.create(model=MODEL, prompt="x")
    server.client.behavior.interval_s = 0.005
    with pytest.raises(openai.APIError):
        list(api.completions.create(model=MODEL, prompt="x", stream=True))


@pytest.mark.parametrize("prompt", ["abc", ["abc", "def", "ghi"]])
def test_a_client_that_leaves_a_stream_aborts_it(server: GatewayServer, api: openai.OpenAI, prompt: Any) -> None:
    server.client.behavior = Behavior(interval_s=0.005)
    aborted = server.recorder.value(metrics.REQUESTS, MODEL, "aborted")
    stream = api.completions.create(model=MODEL, prompt=prompt, stream=True, max_tokens=3000)
    next(iter(stream))
    stream.close()
    expected = 1 if isinstance(prompt, str) else len(prompt)
    wait_until(lambda: len(server.client.closed_early) == expected)
    assert not server.client.active
    wait_until(lambda: server.recorder.value(metrics.REQUESTS, MODEL, "aborted") == aborted + 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_token_aborts(
    server: GatewayServer, http: httpx.Client, stream: bool
) -> None:
    server.client.behavior = Behavior(first_delay_s=30)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "stream": stream}, timeout=0.2)
    wait_until(lambda: len(server.client.closed_early) == 1)
    assert not server.client.active


def test_one_failing_prompt_fails_the_request_and_aborts_the_others(server: GatewayServer, api: openai.OpenAI) -> None:
    server.client.behavior = Behavior(interval_s=0.005)
    with pytest.raises(openai.BadRequestError):
        api.completions.create(model=MODEL, prompt=[[97], [98], [100_000]], max_tokens=3000)
    assert len(server.client.closed_early) == 2
    assert not server.client.active


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_hangs_ends_with_its_deadline(stream: bool) -> None:
    config = ServerConfig(port=0, request_timeout_s=0.3, drain_timeout_s=1)
    with GatewayServer(config) as server:
        api = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        server.client.behavior = Behavior(hang_after=2)
        started = time.monotonic()
        with pytest.raises(openai.APIError) as caught:
            list(api.completions.create(model=MODEL, prompt="abc", stream=stream))
        assert 0.25 < time.monotonic() - started < 3
        assert caught.value.code == "deadline_exceeded"
        if not stream:
            assert isinstance(caught.value, openai.InternalServerError)
            assert caught.value.status_code == 504
        assert not server.client.active
        api.close()


def test_a_client_that_does_not_read_stops_the_reader(server: GatewayServer, http: httpx.Client) -> None:
    """The deltas that wait for a slow client stay bounded; the engine's client merges the rest."""
    server.client.behavior = Behavior(tokens_per_delta=1)
    server.client.max_model_len = 10**7
    body = {"model": MODEL, "prompt": "x" * 1000, "stream": True, "max_tokens": 100_000, "logprobs": 20}
    before = server.recorder.value(metrics.GENERATION_TOKENS, MODEL)
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        time.sleep(0.7)
        assert len(server.client.active) == 1
    wait_until(lambda: not server.client.active)
    server.client.max_model_len = 4096
    wait_until(lambda: server.recorder.value(metrics.GENERATION_TOKENS, MODEL) > before)
    taken = server.recorder.value(metrics.GENERATION_TOKENS, MODEL) - before
    assert MAX_PENDING < taken < 50_000


def test_64_streams_at_once_are_whole_and_apart(server: GatewayServer) -> None:

    server.client.behavior = Behavior(interval_s=0.002)

    async def one(api: openai.AsyncOpenAI, number: int) -> str:
        prompt = f"<{number}>"
        stream = await api.completions.create(model=MODEL, prompt=prompt, stream=True, max_tokens=len(prompt) * 10)
        return "".join([part.choices[0].text async for part in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as api:
            return await asyncio.gather(*(one(api, number) for number in range(64)))

    assert asyncio.run(all_of_them()) == [f"<{number}>" * 10 for number in range(64)]
