"""The key of an answer: everything that changes the output changes it, nothing else does."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.types import ModelInfo, SamplingParams
from penstock.serving.frontend.client import ChatPrompt, Prompt, TextPrompt, TokensPrompt
from penstock.serving.gateway.cache.key import fingerprint, request_key

INFO = ModelInfo(
    architecture="LlamaForCausalLM",
    dtype="float32",
    device="cpu",
    vocab_size=512,
    max_model_len=1024,
    eos_token_ids=(2,),
    num_parameters=1,
    weight_bytes=1,
    model_hash="m1",
    kv_cache_tokens=4096,
    weights="float32",
    kv_cache_dtype="float32",
    kernels="native",
    attention_backend="cpu",
    tokenizer_hash="t1",
    template_hash="c1",
)
CHAT = ChatPrompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
GREEDY = SamplingParams(temperature=0.0)


def key(
    prompts: list[Prompt] | None = None,
    sampling: SamplingParams = GREEDY,
    *,
    version: str = "1",
    model_name: str = "m",
    info: ModelInfo = INFO,
    endpoint: str = "chat",
    cache_salt: str = "",
    tenant: str | None = "a",
) -> str:
    return request_key(
        version=version,
        model_name=model_name,
        info=info,
        endpoint=endpoint,
        prompts=[CHAT] if prompts is None else prompts,
        sampling=sampling,
        cache_salt=cache_salt,
        tenant=tenant,
    )


def test_a_key_is_sha256_and_the_same_for_the_same_request() -> None:
    again = ChatPrompt([dict(message) for message in CHAT.messages])
    assert key() == key([again], SamplingParams(temperature=0.0), info=msgspec.structs.replace(INFO))
    assert len(key()) == 64
    assert set(key()) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "2"},
        {"model_name": "other"},
        {"endpoint": "completions"},
        {"cache_salt": "s"},
        {"tenant": "b"},
        {"tenant": ""},
        {"tenant": None},
    ],
    ids=str,
)
def test_what_surrounds_the_prompt_is_in_the_key(changed: dict[str, Any]) -> None:
    assert key(**changed) != key()


@pytest.mark.parametrize("name", ModelInfo.__struct_fields__)
def test_every_fact_of_a_model_that_changes_its_output_is_in_the_key(name: str) -> None:
    without_effect = {
        "num_parameters",
        "weight_bytes",
        "block_size",
        "kv_cache_tokens",
        "kv_cache_bytes",
        "swap_tokens",
        "max_num_seqs",
        "max_num_batched_tokens",
        "threads",
    }
    value = getattr(INFO, name)
    other: Any = (7,) if isinstance(value, tuple) else value + ("x" if isinstance(value, str) else 1)
    assert (key(info=msgspec.structs.replace(INFO, **{name: other})) == key()) == (name in without_effect)


def test_a_smaller_kv_cache_that_ends_answers_earlier_is_in_the_key() -> None:
    assert key(info=msgspec.structs.replace(INFO, kv_cache_tokens=512)) != key()


OTHER_VALUES: dict[str, Any] = {
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {5: 1.0},
    "allowed_token_ids": (1, 2),
    "seed": 7,
    "stop": ("x",),
    "stop_token_ids": (3,),
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "min_tokens": 1,
    "max_tokens": 9,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "skip_special_tokens": False,
}


@pytest.mark.parametrize("name", SamplingParams.__struct_fields__)
def test_every_sampling_parameter_is_in_the_key(name: str) -> None:
    assert key(sampling=SamplingParams(**{"temperature": 0.0, name: OTHER_VALUES[name]})) != key()


def test_the_order_of_logit_biases_does_not_matter() -> None:
    one = SamplingParams(logit_bias={1: 1.0, 2: -1.0})
    other = SamplingParams(logit_bias={2: -1.0, 1: 1.0})
    assert key(sampling=one) == key(sampling=other)
    assert key(sampling=one) != key(sampling=SamplingParams(logit_bias={1: -1.0, 2: 1.0}))


PROMPTS: list[list[Prompt]] = [
    [TextPrompt("a")],
    [TextPrompt("a", add_special_tokens=False)],
    [TextPrompt("a"), TextPrompt("b")],
    [TextPrompt("b"), TextPrompt("a")],
    [TextPrompt("ab")],
    [TextPrompt("[1,2]")],
    [TokensPrompt([1, 2])],
    [TokensPrompt([2, 1])],
    [TokensPrompt([1]), TokensPrompt([2])],
    [TokensPrompt([12])],
    [ChatPrompt([{"role": "user", "content": "a"}])],
    [ChatPrompt([{"role": "user", "content": "a"}], add_generation_prompt=False)],
    [ChatPrompt([{"role": "user", "content": "a", "name": "x"}])],
    [ChatPrompt([{"role": "assistant", "content": "a"}])],
    [ChatPrompt([{"role": "user", "content": "a"}, {"role": "user", "content": ""}])],
]


def test_different_prompts_have_different_keys() -> None:
    assert len({key(prompts) for prompts in PROMPTS}) == len(PROMPTS)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)
messages = st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "x"]), json_values), max_size=3)


def shape(value: Any) -> Any:
    """Equal exactly where two JSON values are the same: types count, the order of keys does not."""
    if isinstance(value, dict):
        return ("object", tuple(sorted((name, shape(item)) for name, item in value.items())))
    if isinstance(value, list):
        return ("list", tuple(shape(item) for item in value))
    return (type(value).__name__, repr(value))


@settings(max_examples=60, deadline=None)
@given(messages, messages)
def test_messages_have_the_same_key_exactly_when_they_are_the_same(one: Any, other: Any) -> None:
    assert (key([ChatPrompt(one)]) == key([ChatPrompt(other)])) == (shape(one) == shape(other))


@settings(max_examples=40, deadline=None)
@given(messages)
def test_the_order_of_keys_does_not_matter_and_the_order_of_messages_does(content: Any) -> None:
    turned = [dict(reversed(message.items())) for message in content]
    assert key([ChatPrompt(turned)]) == key([ChatPrompt(content)])
    backwards = content[::-1]
    assert (key([ChatPrompt(backwards)]) == key([ChatPrompt(content)])) == (shape(backwards) == shape(content))


@pytest.mark.parametrize("value", [1, 1.0, "1", True, [1], {"1": 1}, None], ids=repr)
def test_values_of_different_types_are_different(value: Any) -> None:
    others = [1, 1.0, "1", True, [1], {"1": 1}, None]
    keys = [key([ChatPrompt([{"role": "user", "content": other}])]) for other in others]
    assert keys.count(key([ChatPrompt([{"role": "user", "content": value}])])) == 1


def best_of(action: Callable[[], object], rounds: int = 20, number: int = 100) -> float:
    return min(timeit.repeat(action, number=number, repeat=rounds)) / number


def test_a_key_costs_little_beside_a_cached_answer() -> None:
    """60 µs is the budget; the best of many rounds leaves a busy machine out of it."""
    prompt = ChatPrompt(
        [{"role": "system", "content": "x" * 200}, {"role": "user", "content": "Why is the sky blue? " * 5}]
    )
    fingerprint("1", "m", INFO)
    assert best_of(lambda: key([prompt])) < 60e-6
