"""Every request parameter, seen through its effect on the real engine, with the official client over real HTTP."""

from __future__ import annotations

import math
import time
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion

from penstock.testing.server import RunningServer

PROMPT = "Once upon a time"
EOS = 2


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Completion:
    """A completion of 12 tokens, greedy unless told otherwise; unknown fields go into the body as they are."""
    known = {"temperature": 0.0, "max_tokens": 12} | fields
    extra = {name: known.pop(name) for name in list(known) if name in EXTENSIONS}
    result = client.completions.create(model="stories", prompt=prompt, extra_body=extra, **known)
    assert isinstance(result, Completion)
    return result


EXTENSIONS = {
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "allowed_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "cache_salt",
    "priority",
    "return_token_ids",
}


def text_of(result: Completion) -> str:
    return result.choices[0].text


def token_ids(client: openai.OpenAI, **fields: Any) -> list[int]:
    result = complete(client, return_token_ids=True, **fields)
    ids = (result.choices[0].model_extra or {})["token_ids"]
    assert isinstance(ids, list)
    return ids


@pytest.fixture(scope="session")
def greedy(client: openai.OpenAI) -> str:
    return text_of(complete(client))


@pytest.fixture(scope="session")
def greedy_ids(client: openai.OpenAI) -> list[int]:
    return token_ids(client)


def test_temperature_zero_is_deterministic(client: openai.OpenAI, greedy: str) -> None:
    assert len(greedy) > 10
    assert {text_of(complete(client)) for _ in range(3)} == {greedy}


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda f: next(iter(f)))
def test_filters_at_their_extreme_are_greedy(client: openai.OpenAI, greedy: str, fields: dict[str, float]) -> None:
    assert text_of(complete(client, temperature=1.5, seed=1, **fields)) == greedy


def test_high_temperature_differs_and_a_seed_repeats_it(client: openai.OpenAI, greedy: str) -> None:
    hot = [text_of(complete(client, temperature=1.8, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1]
    assert len({*hot, greedy}) == 3
    assert len({text_of(complete(client, temperature=1.8)) for _ in range(4)}) > 1, "without a seed, one is drawn"


def test_logit_bias_forces_and_bans(client: openai.OpenAI, greedy_ids: list[int]) -> None:
    assert set(token_ids(client, logit_bias={"300": 100}, max_tokens=3)) == {300}
    assert greedy_ids[0] not in token_ids(client, logit_bias={str(greedy_ids[0]): -100})


def test_allowed_token_ids_restrict(client: openai.OpenAI) -> None:
    assert set(token_ids(client, allowed_token_ids=[300, 301, 302], temperature=1.0)) <= {300, 301, 302}


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 3.0}],
    ids=lambda penalty: next(iter(penalty)),
)
def test_penalties_spread_the_tokens(client: openai.OpenAI, penalty: dict[str, float]) -> None:
    fields: dict[str, Any] = {"allowed_token_ids": list(range(300, 340)), "max_tokens": 30}
    assert len(set(token_ids(client, **fields, **penalty))) > len(set(token_ids(client, **fields)))


def test_stop_strings_cut_across_token_borders(client: openai.OpenAI, greedy: str) -> None:
    for start in range(3, 9):
        stop = greedy[start : start + 5]
        result = complete(client, stop=[stop])
        assert text_of(result) == greedy[: greedy.index(stop)]
        assert result.choices[0].finish_reason == "stop"
    kept = complete(client, stop=greedy[4:9], include_stop_str_in_output=True)
    assert text_of(kept) == greedy[: greedy.index(greedy[4:9]) + 5]


def test_stop_token_ids_and_min_tokens(client: openai.OpenAI, greedy_ids: list[int]) -> None:
    stop = greedy_ids[4]
    first = greedy_ids.index(stop)
    result = complete(client, stop_token_ids=[stop])
    assert result.choices[0].finish_reason == "stop"
    assert result.usage is not None
    assert result.usage.completion_tokens == first + 1
    longer = token_ids(client, stop_token_ids=[stop], min_tokens=first + 3)
    assert stop not in longer[: first + 3]
    assert len(longer) > first + 1


def test_max_tokens_ignore_eos_and_finish_reasons(client: openai.OpenAI) -> None:
    story = [{"role": "user", "content": "Write a story about a fox who learns the value of honesty in a forest."}]
    ended = client.chat.completions.create(model="stories", messages=story, temperature=0, max_tokens=400)  # type: ignore[arg-type]
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage is not None
    length = ended.usage.completion_tokens
    assert length < 400
    body: dict[str, Any] = {"model": "stories", "messages": story, "temperature": 0, "max_tokens": length + 5}
    going_on = client.chat.completions.create(**body, extra_body={"ignore_eos": True})
    assert going_on.choices[0].finish_reason == "length"
    assert going_on.usage.completion_tokens == length + 5


def test_skip_special_tokens(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"logit_bias": {str(EOS): 100}, "max_tokens": 2, "ignore_eos": True}
    assert text_of(complete(client, **fields)) == ""
    assert text_of(complete(client, **fields, skip_special_tokens=False)) == "<|end|><|end|>"


def test_logprobs_are_those_of_the_model(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    for chosen, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert chosen == pytest.approx(max(top.values())), "greedy chooses the likeliest"
        assert sum(map(math.exp, top.values())) <= 1.0 + 1e-6


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="stories",
        messages=[{"role": "user", "content": "Hello"}],
        max_completion_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    for entry in choice.logprobs.content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )


def test_echo_with_logprobs_scores_a_text_like_its_generation(client: openai.OpenAI, greedy_ids: list[int]) -> None:
    prompt = client.completions.create(
        model="stories", prompt=PROMPT, max_tokens=1, extra_body={"return_token_ids": True}
    )
    prompt_ids = (prompt.choices[0].model_extra or {})["prompt_token_ids"]
    generated = complete(client, logprobs=0).choices[0].logprobs
    scored = (
        complete(client, prompt=[*prompt_ids, *greedy_ids], echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    )
    assert generated is not None
    assert generated.token_logprobs is not None
    assert scored is not None
    assert scored.token_logprobs is not None
    assert scored.token_logprobs[0] is None
    assert scored.token_logprobs[-12:] == pytest.approx(generated.token_logprobs, abs=1e-4)


def test_n_samples_are_those_of_their_index(client: openai.OpenAI) -> None:
    several = complete(client, temperature=1.2, seed=5, n=4)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert text_of(complete(client, temperature=1.2, seed=5)) == texts[0]
    assert several.usage is not None
    assert several.usage.completion_tokens == 48


def test_every_form_of_prompt(client: openai.OpenAI, server: RunningServer, greedy: str) -> None:
    tokens = httpx.post(f"{server.url}/v1/tokenize", json={"model": "stories", "prompt": PROMPT}).json()["tokens"]
    assert text_of(complete(client, prompt=tokens)) == greedy
    assert text_of(complete(client, prompt=[PROMPT, "The fox"])) == greedy
    assert text_of(complete(client, prompt=[tokens, tokens[:2]])) == greedy
    back = httpx.post(f"{server.url}/v1/detokenize", json={"model": "stories", "tokens": tokens}).json()
    assert PROMPT in back["prompt"]


def test_cached_tokens_are_reported_and_salts_separate_them(client: openai.OpenAI) -> None:
    prompt = "The " + "very " * 60 + "old fox"
    counts = []
    for salt in ("a", "a", "b"):
        usage = complete(client, prompt=prompt, max_tokens=1, cache_salt=salt).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        counts.append(usage.prompt_tokens_details.cached_tokens)
    assert counts[0] == counts[2] == 0
    assert counts[1] is not None
    assert counts[1] >= 48


def test_streaming_says_the_same_as_not_streaming(client: openai.OpenAI, greedy: str) -> None:
    chunks = list(
        client.completions.create(
            model="stories",
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == greedy
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]


def test_the_request_id_comes_back_and_is_in_the_log(client: openai.OpenAI, server: RunningServer) -> None:
    raw = client.completions.with_raw_response.create(
        model="stories", prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "my-id-42"}
    )
    assert raw.headers["x-request-id"] == "my-id-42"
    deadline = time.monotonic() + 5  # the line is written when the response has left
    while "my-id-42" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logprobs": 99}, "logprobs"),
        ({"stop_token_ids": [4096]}, "stop_token_ids"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"allowed_token_ids": [9999]}, "allowed_token_ids"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"allowed_token_ids": [EOS], "min_tokens": 2}, "allowed_token_ids"),
        ({"allowed_token_ids": [300], "stop_token_ids": [300], "min_tokens": 1}, "allowed_token_ids"),
    ],
    ids=str,
)
def test_bad_values_are_400_and_name_the_field(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_too_long_says_all_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt=[300] * 2000, max_tokens=100)
    assert caught.value.code == "context_length_exceeded"
    assert "2100" in caught.value.message
    assert "2048" in caught.value.message
    assert "the KV cache holds" in caught.value.message


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x")


def test_live_limits_change_over_http(server: RunningServer, client: openai.OpenAI, greedy: str) -> None:
    url = f"{server.url}/v1/engine/limits"
    ceiling = httpx.get(url).json()
    changed = httpx.patch(url, json={"max_num_seqs": 2, "max_num_batched_tokens": 32})
    assert changed.status_code == 200, changed.text
    try:
        assert httpx.get(url).json()["max_num_seqs"] == 2
        assert text_of(complete(client)) == greedy
        refused = httpx.patch(url, json={"max_num_seqs": ceiling["max_num_seqs"] + 1})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "max_num_seqs"
    finally:
        httpx.patch(url, json={name: ceiling[name] for name in ("max_num_seqs", "max_num_batched_tokens")})
