"""What a complete answer holds: choices, finish reasons, usage, log-probabilities, echo."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import openai
import pytest

from penstock.serving.frontend.client import TokenLogprob
from penstock.serving.gateway.logprobs import LOWEST, TextOffsets, chat_logprobs, completion_logprobs
from penstock.testing.fake_client import BOS, EOS, Behavior
from penstock.testing.gateway_server import MODEL, GatewayServer

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


def value_of(token: int) -> float:
    """The fake's log-probability of a token."""
    return -(token % 8 + 1) / 8


@pytest.mark.parametrize(
    ("reply", "fields", "text", "finish", "stop_reason", "tokens"),
    [
        ("abc", {}, "abc", "stop", None, 4),
        ("abcdef", {"max_tokens": 3}, "abc", "length", None, 3),
        ("abcdef", {"stop": "de"}, "abc", "stop", "de", 5),
        ("abcdef", {"stop": "de", "include_stop_str_in_output": True}, "abcde", "stop", "de", 5),
        ("abcdef", {"stop_token_ids": [ord("c")]}, "ab", "stop", ord("c"), 3),
        ("abc", {"max_tokens": 0}, "", "length", None, 0),
        ("né🙂", {}, "né🙂", "stop", None, 8),
    ],
)
def test_finish_reasons_are_real(
    server: GatewayServer,
    api: openai.OpenAI,
    reply: str,
    fields: dict[str, Any],
    text: str,
    finish: str,
    stop_reason: Any,
    tokens: int,
) -> None:
    server.client.behavior.reply = reply
    answer = api.completions.create(model=MODEL, prompt="xy", extra_body=fields)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.model_extra) == (text, finish, {"stop_reason": stop_reason})
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        3,
        tokens,
        3 + tokens,
    )


def test_chat_answer(server: GatewayServer, api: openai.OpenAI) -> None:
    server.client.behavior = Behavior(reply="hello", num_cached_tokens=5)
    answer = api.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    message = answer.choices[0].message
    assert (message.role, message.content, message.refusal) == ("assistant", "hello", None)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 5
    assert answer.usage.completion_tokens == 6


def test_prompts_times_samples_in_openais_order(server: GatewayServer, api: openai.OpenAI) -> None:
    answer = api.completions.create(model=MODEL, prompt=["ab", "cd", "ef"], n=2, max_tokens=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(
        enumerate(["ab", "ab", "cd", "cd", "ef", "ef"])
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 12)
    assert len({request.request_id for request in server.client.requests}) == 3


def test_engine_ids_are_ours(server: GatewayServer, api: openai.OpenAI) -> None:
    answer = api.completions.create(model=MODEL, prompt="a", extra_headers={"X-Request-Id": "theirs"})
    assert server.client.requests[0].request_id == f"{answer.id}-0"


def test_completion_logprobs(server: GatewayServer, api: openai.OpenAI) -> None:
    server.client.behavior.reply = "aé"
    logprobs = api.completions.create(model=MODEL, prompt="x", logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "</s>"]
    assert logprobs.token_logprobs == [value_of(token) for token in (97, 0xC3, 0xA9, EOS)]
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"a": value_of(97), "b": value_of(97) - 0.25}


def test_zero_alternatives_still_name_the_token(api: openai.OpenAI) -> None:
    logprobs = api.completions.create(model=MODEL, prompt="x", logprobs=0, max_tokens=1).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs == [{"x": value_of(ord("x"))}]


def test_loglikelihood_of_a_prompt(server: GatewayServer, api: openai.OpenAI) -> None:
    """How lm-eval scores: token ids in, echo, logprobs=1, nothing generated."""
    context, continuation = [BOS, 104, 101], [108, 195, 182]
    answer = api.completions.create(
        model=MODEL,
        prompt=[context + continuation, context],
        echo=True,
        logprobs=1,
        max_tokens=0,
        temperature=0,
        seed=1,
    )
    choice = answer.choices[0]
    assert choice.text == "helö"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    values = choice.logprobs.token_logprobs[len(context) :]
    assert values == [value_of(token) for token in continuation]
    tops = choice.logprobs.top_logprobs[len(context) :]
    assert all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
    assert choice.logprobs.text_offset == [0, 0, 1, 2, 3, 3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert server.client.requests[0].sampling.prompt_logprobs == 1


def test_echo_with_generation(api: openai.OpenAI) -> None:
    choice = api.completions.create(model=MODEL, prompt="héy", echo=True, logprobs=1, max_tokens=2).choices[0]
    assert choice.text == "héyh�"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["<s>", "h", "bytes:\\xc3", "bytes:\\xa9", "y", "h", "bytes:\\xc3"]
    assert choice.logprobs.text_offset == [0, 0, 1, 1, 2, 3, 4]


def test_echo_without_logprobs_asks_for_none(server: GatewayServer, api: openai.OpenAI) -> None:
    answer = api.completions.create(model=MODEL, prompt=["a", "b"], echo=True, n=2, max_tokens=1)
    assert [choice.text for choice in answer.choices] == ["aa", "aa", "bb", "bb"]
    assert server.client.requests[0].sampling.prompt_logprobs is None


def test_chat_logprobs(server: GatewayServer, api: openai.OpenAI) -> None:
    server.client.behavior.reply = "é"
    answer = api.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.bytes for token in logprobs.content] == [[0xC3], [0xA9], list(b"</s>")]
    assert logprobs.content[0].logprob == value_of(0xC3)
    assert [(top.bytes, top.logprob) for top in logprobs.content[0].top_logprobs] == [
        ([0xC3], value_of(0xC3)),
        ([0xC4], value_of(0xC3) - 0.25),
    ]


def test_prompt_logprobs_extension(api: openai.OpenAI) -> None:
    expected = [None, {"97": {"logprob": value_of(97), "decoded_token": "a"}}]
    completion = api.completions.create(model=MODEL, prompt="a", extra_body={"prompt_logprobs": 0}).choices[0]
    assert completion.model_extra is not None
    assert completion.model_extra["prompt_logprobs"] == expected
    chat = api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, extra_body={"prompt_logprobs": 1})
    assert chat.model_extra is not None
    assert [len(entry or {}) for entry in chat.model_extra["prompt_logprobs"][:2]] == [0, 1]


def test_return_token_ids(server: GatewayServer, api: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    choice = api.completions.create(model=MODEL, prompt="ab", max_tokens=2, extra_body=extra).choices[0]
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == [97, 98]
    assert choice.model_extra["prompt_token_ids"] == [BOS, 97, 98]
    chat = api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, extra_body=extra)
    assert chat.model_extra is not None
    assert chat.model_extra["prompt_token_ids"][0] == BOS
    assert chat.choices[0].model_extra is not None
    assert chat.choices[0].model_extra["token_ids"] == [ord("<")]


def test_extensions_are_absent_unless_asked_for(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"}).json()
    assert set(answer["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}


def token(token_bytes: bytes, logprob: float | None = -1.0) -> TokenLogprob:
    return TokenLogprob(0, token_bytes.decode(errors="replace"), token_bytes, logprob)


def test_offsets_follow_the_text_that_is_shown() -> None:
    offsets = TextOffsets(text="Hello wörld")
    tokens = [b"<s>", b" Hello", b" w", b"\xc3", b"\xb6", b"rld"]
    assert [offsets.next(token(part)) for part in tokens] == [0, 0, 5, 7, 7, 8]


def test_infinite_logprobs_become_openais_lowest() -> None:
    impossible = token(b"a", float("-inf"))
    assert completion_logprobs([impossible], TextOffsets(), 0).token_logprobs == [LOWEST]
    assert chat_logprobs([impossible]).content[0].logprob == LOWEST


def test_tokens_that_read_alike_keep_apart() -> None:
    names = [
        completion_logprobs([token(part)], TextOffsets(), 0).tokens[0] for part in (b"\xff", b"\xfe", "�".encode())
    ]
    assert all(first != second for first, second in itertools.combinations(names, 2))
