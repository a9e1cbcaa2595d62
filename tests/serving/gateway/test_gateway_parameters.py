"""Every request field, through the official client: what reaches the engine, what is refused and how."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import ChatPrompt, TextPrompt, TokensPrompt
from penstock.testing.gateway_server import MODEL, GatewayServer

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]

# (field, value, name in SamplingParams, value there)
SAMPLING: list[tuple[str, Any, str, Any]] = [
    ("n", 3, "n", 3),
    ("temperature", 0, "temperature", 0.0),
    ("temperature", 2, "temperature", 2.0),
    ("top_p", 0.5, "top_p", 0.5),
    ("top_p", 0, "top_p", 1e-6),
    ("top_k", 5, "top_k", 5),
    ("top_k", -1, "top_k", -1),
    ("min_p", 0.1, "min_p", 0.1),
    ("presence_penalty", -2, "presence_penalty", -2.0),
    ("frequency_penalty", 2, "frequency_penalty", 2.0),
    ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
    ("logit_bias", {"5": -100, "6": 1.5}, "logit_bias", {5: -100.0, 6: 1.5}),
    ("allowed_token_ids", [1, 2], "allowed_token_ids", (1, 2)),
    ("seed", -(2**63), "seed", -(2**63)),
    ("seed", 2**63 - 1, "seed", 2**63 - 1),
    ("stop", "ab", "stop", ("ab",)),
    ("stop", ["ab", "cd"], "stop", ("ab", "cd")),
    ("stop", [], "stop", ()),
    ("stop_token_ids", [3], "stop_token_ids", (3,)),
    ("include_stop_str_in_output", True, "include_stop_str_in_output", True),
    ("ignore_eos", True, "ignore_eos", True),
    ("min_tokens", 2, "min_tokens", 2),
    ("max_tokens", 7, "max_tokens", 7),
    ("prompt_logprobs", 3, "prompt_logprobs", 3),
    ("skip_special_tokens", False, "skip_special_tokens", False),
]


def complete(api: openai.OpenAI, **fields: Any) -> Any:
    """Extensions go through extra_body, which is how users of the official client send them."""
    return api.completions.create(model=MODEL, prompt="hello", extra_body=fields)


def chat(api: openai.OpenAI, **fields: Any) -> Any:
    return api.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"max_tokens": 4, **fields})


@pytest.mark.parametrize(("field", "value", "name", "expected"), SAMPLING)
@pytest.mark.parametrize("call", [complete, chat])
def test_sampling_fields_reach_the_engine(
    server: GatewayServer, api: openai.OpenAI, call: Any, field: str, value: Any, name: str, expected: Any
) -> None:
    call(api, **{field: value})
    assert getattr(server.client.requests[0].sampling, name) == expected


def test_defaults_are_openais(server: GatewayServer, api: openai.OpenAI) -> None:
    complete(api)
    api.chat.completions.create(model=MODEL, messages=MESSAGES)
    completion, conversation = server.client.requests
    assert completion.sampling == SamplingParams(max_tokens=16)
    assert conversation.sampling == SamplingParams()
    assert completion.prompt == TextPrompt("hello")
    assert conversation.prompt == ChatPrompt([{"role": "user", "content": "hi"}])
    assert completion.timeout_s == server.config.request_timeout_s


def test_priority_and_cache_salt_travel(server: GatewayServer, api: openai.OpenAI) -> None:
    complete(api, priority=-5, cache_salt="tenant")
    assert (server.client.requests[0].priority, server.client.requests[0].cache_salt) == (-5, "tenant")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [TextPrompt("a")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokensPrompt([1, 2])]),
        ([[1, 2], [3]], [TokensPrompt([1, 2]), TokensPrompt([3])]),
    ],
)
def test_prompt_forms(server: GatewayServer, api: openai.OpenAI, prompt: Any, expected: list[Any]) -> None:
    api.completions.create(model=MODEL, prompt=prompt)
    assert [request.prompt for request in server.client.requests] == expected


def test_add_special_tokens(server: GatewayServer, api: openai.OpenAI) -> None:
    complete(api, add_special_tokens=False)
    assert server.client.requests[0].prompt == TextPrompt("hello", add_special_tokens=False)


def test_messages_become_the_templates_dictionaries(server: GatewayServer, api: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None, "annotations": []},
    ]
    api.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=1, extra_body={"add_generation_prompt": False}
    )
    assert server.client.requests[0].prompt == ChatPrompt(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a\nb", "name": "Ann"},
            {"role": "assistant", "content": "c"},
        ],
        add_generation_prompt=False,
    )


def test_an_answer_can_be_sent_back(api: openai.OpenAI) -> None:
    answer = chat(api).choices[0].message
    again = api.chat.completions.create(model=MODEL, messages=[*MESSAGES, answer.model_dump()], max_tokens=1)
    assert again.choices[0].finish_reason == "length"


def test_max_completion_tokens(server: GatewayServer, api: openai.OpenAI) -> None:
    api.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=9)
    assert server.client.requests[0].sampling.max_tokens == 9


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 20}, 20), ({"logprobs": False}, None)],
)
def test_chat_logprobs_fields(server: GatewayServer, api: openai.OpenAI, fields: dict[str, Any], logprobs: int) -> None:
    chat(api, **fields)
    assert server.client.requests[0].sampling.logprobs == logprobs


NO_EFFECT: list[tuple[str, Any]] = [
    ("user", "someone"),
    ("metadata", {"a": "b"}),
    ("store", False),
    ("service_tier", "auto"),
    ("safety_identifier", "x"),
    ("prompt_cache_key", "x"),
    ("prompt_cache_retention", "24h"),
    ("parallel_tool_calls", True),
    ("tools", []),
    ("tool_choice", "auto"),
    ("functions", []),
    ("function_call", "none"),
    ("response_format", {"type": "text"}),
    ("modalities", ["text"]),
    ("reasoning_effort", "none"),
    ("verbosity", "medium"),
    ("chat_template_kwargs", {}),
    ("logit_bias", {}),
    ("n", 1),
    ("presence_penalty", 0),
]


@pytest.mark.parametrize(("field", "value"), NO_EFFECT)
def test_neutral_values_and_fields_without_effect_pass(
    server: GatewayServer, api: openai.OpenAI, field: str, value: Any
) -> None:
    chat(api, **{field: value})
    assert server.client.requests[0].sampling == SamplingParams(max_tokens=4)


@pytest.mark.parametrize(
    "field",
    [
        "tools",
        "response_format",
        "temperature",
        "stop",
        "seed",
        "logprobs",
        "stream_options",
        "audio",
        "never_heard_of",
    ],
)
def test_null_counts_as_absent(api: openai.OpenAI, field: str) -> None:
    assert chat(api, **{field: None}).choices


@pytest.mark.parametrize("field", ["suffix", "best_of", "echo", "logprobs", "max_tokens", "user"])
def test_null_counts_as_absent_in_completions(api: openai.OpenAI, field: str) -> None:
    assert complete(api, **{field: None}).choices


@pytest.mark.parametrize("fields", [{"suffix": ""}, {"best_of": 1}, {"best_of": 2, "n": 2}, {"user": "x"}])
def test_neutral_completion_fields(api: openai.OpenAI, fields: dict[str, Any]) -> None:
    assert complete(api, **fields).choices


UNSUPPORTED_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"prediction": {"type": "content"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"store": True}, "store"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    (
        {"messages": [*MESSAGES, {"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[1].content[0].type",
    ),
]


@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED_CHAT)
def test_what_is_not_implemented_is_refused_by_name(api: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(api, **fields)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
    assert param in caught.value.message


@pytest.mark.parametrize(("fields", "param"), [({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of")])
def test_completion_fields_that_are_not_implemented(api: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(api, **fields)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)


@pytest.mark.parametrize("call", [complete, chat])
@pytest.mark.parametrize("field", ["temprature", "guided_json", "use_beam_search", "a" * 500, "x\ny"])
def test_unknown_fields_are_refused_by_name(api: openai.OpenAI, call: Any, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        call(api, **{field: 1})
    assert caught.value.code == "unknown_parameter"
    assert caught.value.param == field[:64].replace("\n", "\\n")


WRONG: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("n", "1"),
    ("n", 1.0),
    ("n", 10**30),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", 10**30),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**31),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": True}),
    ("logit_bias", {"1": "x"}),
    ("logit_bias", {str(2**31): 1}),
    ("logit_bias", {"١": 1}),
    ("logit_bias", {str(token): 0 for token in range(1025)}),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-1]),
    ("allowed_token_ids", [True]),
    ("allowed_token_ids", [1.5]),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 1.5),
    ("stop", 5),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a"] * 17),
    ("stop", ["a", None]),
    ("stop", "x" * 1025),
    ("stop_token_ids", 5),
    ("stop_token_ids", ["5"]),
    ("stop_token_ids", list(range(65))),
    ("include_stop_str_in_output", 1),
    ("ignore_eos", "true"),
    ("min_tokens", -1),
    ("min_tokens", 1000),
    ("max_tokens", -1),
    ("max_tokens", 2**31),
    ("max_tokens", "5"),
    ("max_tokens", 2.0),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", True),
    ("priority", 2**31),
    ("cache_salt", ""),
    ("cache_salt", "x" * 1025),
    ("cache_salt", 5),
    ("stream", "yes"),
    ("stream_options", []),
    ("user", 5),
    ("model", 5),
    ("model", ""),
]


@pytest.mark.parametrize("call", [complete, chat])
@pytest.mark.parametrize(("field", "value"), WRONG)
def test_wrong_values_are_refused_by_name(
    server: GatewayServer, api: openai.OpenAI, call: Any, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        call(api, **{field: value})
    assert str(caught.value.param).partition("[")[0] == field
    assert caught.value.type == "invalid_request_error"
    assert not server.client.requests


WRONG_COMPLETION: list[tuple[str, Any]] = [
    ("prompt", 5),
    ("prompt", []),
    ("prompt", {}),
    ("prompt", [1, "a"]),
    ("prompt", ["a", 1]),
    ("prompt", [True, False]),
    ("prompt", [1, True]),
    ("prompt", [-1]),
    ("prompt", [1.0]),
    ("prompt", [2**31]),
    ("prompt", [[]]),
    ("prompt", [[1], []]),
    ("prompt", [[1], ["a"]]),
    ("prompt", [[[1]]]),
    ("prompt", [None]),
    ("prompt", ["a"] * 129),
    ("prompt", [1, 5000]),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("echo", "yes"),
    ("best_of", 21),
]


@pytest.mark.parametrize(("field", "value"), WRONG_COMPLETION)
def test_wrong_completion_values(api: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(api, **{field: value})
    assert caught.value.param == field


def test_prompts_times_samples_is_bounded(server: GatewayServer, api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(model=MODEL, prompt=["a"] * 100, n=11)
    assert caught.value.param == "n"
    assert not server.client.requests


WRONG_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "messages[0].nmae"),
    ({"messages": MESSAGES * 4097}, "messages"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {str(key): "x" for key in range(17)}}, "metadata"),
    ({"service_tier": "best"}, "service_tier"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_CHAT)
def test_wrong_chat_values(api: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(api, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(("path", "field"), [("completions", "prompt"), ("chat/completions", "messages")])
def test_required_fields(http: httpx.Client, path: str, field: str) -> None:
    for body, missing in (({}, "model"), ({"model": MODEL}, field), ({"model": MODEL, field: None}, field)):
        error = http.post(f"/v1/{path}", json=body).json()["error"]
        assert (error["param"], error["code"]) == (missing, "missing_required_parameter")
