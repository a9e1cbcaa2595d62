"""The cache over HTTP: a kept or shared answer is the answer, in every form that an endpoint has."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from penstock.core.gateway_config import GatewayConfig
from penstock.testing.fake_client import Behavior
from penstock.testing.gateway_server import MODEL, GatewayServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[GatewayServer]:
    with GatewayServer(settings=GatewayConfig(auth="none")) as server:
        yield server


@pytest.fixture
def server(shared_server: GatewayServer) -> GatewayServer:
    shared_server.client.behavior = Behavior()
    shared_server.client.requests.clear()
    shared_server.client.closed_early.clear()
    return shared_server


def chat(**fields: Any) -> dict[str, Any]:
    """A greedy request that nobody has sent before."""
    messages = [{"role": "user", "content": f"é {next(_numbers)}"}]
    return {"model": MODEL, "messages": messages, "max_tokens": 9, "temperature": 0, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": f"é {next(_numbers)}", "max_tokens": 9, "temperature": 0, **fields}


def ask(server: GatewayServer, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=30)


def outcome(response: httpx.Response) -> str:
    return response.headers["x-penstock-cache"]


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """Without what belongs to one request: its id, its time, what it was spared."""
    usage = {name: value for name, value in (body.get("usage") or {}).items() if name != "prompt_tokens_details"}
    return {**body, "id": None, "created": None, "usage": usage}


FORMS = [
    (CHAT, chat),
    (CHAT, lambda: chat(n=3, logprobs=True, top_logprobs=2, return_token_ids=True)),
    (CHAT, lambda: chat(prompt_logprobs=1)),
    (CHAT, lambda: chat(stop=["é"])),
    (CHAT, lambda: chat(temperature=0.7, seed=3, n=2)),
    (COMPLETIONS, completion),
    (COMPLETIONS, lambda: completion(prompt=["one", "two", f"three {next(_numbers)}"], n=2, logprobs=1, echo=True)),
    (COMPLETIONS, lambda: completion(prompt=[1, 2, 3, next(_numbers)], return_token_ids=True)),
    (COMPLETIONS, lambda: completion(max_tokens=0, echo=True)),
]


@pytest.mark.parametrize(("path", "make"), FORMS)
def test_a_kept_answer_is_the_answer(server: GatewayServer, path: str, make: Any) -> None:
    body = make()
    first = ask(server, path, body)
    assert (first.status_code, outcome(first)) == (200, "miss")
    for _ in range(2):
        again = ask(server, path, body)
        assert (again.status_code, outcome(again)) == (200, "hit")
        assert answer(again.json()) == answer(first.json())
        assert again.json()["id"] != first.json()["id"]
        usage = again.json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    assert len({request.request_id.rpartition("-")[0] for request in server.client.requests}) == 1


def streamed(response: httpx.Response) -> dict[int, tuple[str, str | None]]:
    """Text and finish reason per choice of a stream that ended well."""
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    found: dict[int, tuple[str, str | None]] = {}
    for chunk in map(json.loads, events[:-1]):
        for choice in chunk["choices"]:
            text, finish = found.get(choice["index"], ("", None))
            piece = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            found[choice["index"]] = (text + piece, finish or choice["finish_reason"])
    return found


@pytest.mark.parametrize(("path", "make"), [(CHAT, chat), (COMPLETIONS, completion)])
def test_streams_and_whole_answers_are_one_in_the_cache(server: GatewayServer, path: str, make: Any) -> None:
    body = make(n=2)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    first = ask(server, path, {**body, **options})
    second = ask(server, path, {**body, **options})
    whole = ask(server, path, body)
    assert [outcome(response) for response in (first, second, whole)] == ["miss", "hit", "hit"]
    assert streamed(first) == streamed(second)
    for choice in whole.json()["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert streamed(first)[choice["index"]] == (text, choice["finish_reason"])


def test_what_only_changes_the_form_does_not_change_the_answer(server: GatewayServer) -> None:
    body = completion()
    assert outcome(ask(server, COMPLETIONS, body)) == "miss"
    for form in (
        {"return_token_ids": True},
        {"echo": True},
        {"stream": True},
        {"user": "u"},
        {"priority": 3},
        {"timeout": 9},
    ):
        assert outcome(ask(server, COMPLETIONS, {**body, **form})) == "hit"
    ids = ask(server, COMPLETIONS, {**body, "return_token_ids": True}).json()["choices"][0]["token_ids"]
    assert len(ids) == 9
    assert ask(server, COMPLETIONS, {**body, "echo": True}).json()["choices"][0]["text"].startswith(body["prompt"])


async def test_requests_at_once_share_one_generation(server: GatewayServer) -> None:
    server.client.behavior = Behavior(interval_s=0.01)
    body = chat(n=2)
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        posts = [http.post(CHAT, json={**body, "stream": number % 2 == 1}) for number in range(8)]
        responses = await asyncio.gather(*posts)
    assert sorted(map(outcome, responses)) == ["coalesced"] * 7 + ["miss"]
    assert len(server.client.requests) == 1
    text = {0: responses[0].json()["choices"][0]["message"]["content"]}
    for response in responses[1::2]:
        assert streamed(response)[0][0] == text[0]


async def test_the_others_live_on_when_the_leader_disconnects(server: GatewayServer) -> None:
    server.client.behavior = Behavior(interval_s=0.02)
    body = chat(max_tokens=40)
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        async with http.stream("POST", CHAT, json={**body, "stream": True}) as leader:
            assert leader.headers["x-penstock-cache"] == "miss"
            follower = asyncio.create_task(http.post(CHAT, json=body))
            chunks = leader.aiter_lines()
            for _ in range(6):
                await anext(chunks)
        response = await follower
    assert (response.status_code, response.json()["usage"]["completion_tokens"]) == (200, 40)
    assert len(server.client.requests) == 1
    assert server.client.closed_early == []
    # The follower was promoted or had come first to the end; either way the answer is kept.
    assert outcome(ask(server, CHAT, body)) == "hit"


async def test_the_generation_stops_when_everybody_has_gone(server: GatewayServer) -> None:
    server.client.behavior = Behavior(interval_s=0.02)
    body = chat(max_tokens=2000, stream=True)
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        async with http.stream("POST", CHAT, json=body) as one, http.stream("POST", CHAT, json=body) as other:
            await anext(one.aiter_lines())
            await anext(other.aiter_lines())
        async with asyncio.timeout(20):
            while not server.client.closed_early:  # noqa: ASYNC110  # another thread's list has no event
                await asyncio.sleep(0.01)
    server.client.behavior = Behavior()
    assert outcome(ask(server, CHAT, body)) == "miss"


def test_a_failed_answer_is_not_kept(server: GatewayServer) -> None:
    server.client.behavior = Behavior(error=RuntimeError("secret"), error_after=3)
    body = chat()
    response = ask(server, CHAT, body)
    assert response.status_code == 500
    assert "secret" not in response.text
    server.client.behavior = Behavior()
    assert outcome(ask(server, CHAT, body)) == "miss"


def test_wishes_of_the_client(server: GatewayServer) -> None:
    body = chat()
    no_store = ask(server, CHAT, body, **{"Cache-Control": "no-store"})
    missing = ask(server, CHAT, body, **{"Cache-Control": "only-if-cached"})
    assert outcome(no_store) == "bypass"
    assert (missing.status_code, missing.json()["error"]["code"]) == (504, "not_cached")
    assert outcome(ask(server, CHAT, body)) == "miss"
    assert outcome(ask(server, CHAT, body, **{"Cache-Control": "only-if-cached"})) == "hit"
    assert outcome(ask(server, CHAT, body, **{"Cache-Control": "no-cache"})) == "miss"
    assert outcome(ask(server, CHAT, {**body, "cache": {"use": False}})) == "bypass"
    wrong = ask(server, CHAT, {**body, "cache": {"ttl": 100_000}})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "cache.ttl")
