"""Who may be answered from the cache: docs/caching.md, row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest

from penstock.core.errors import InvalidRequestError
from penstock.core.types import SamplingParams
from penstock.serving.gateway.cache.policy import Plan, make_plan, parse_cache_control
from penstock.serving.gateway.schemas.chat import ChatBody
from penstock.serving.gateway.schemas.completions import CompletionBody
from penstock.serving.gateway.schemas.sampling import CacheOptions

KEY = "ab" * 32
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0)


def plan(
    *cache_control: str,
    sampling: SamplingParams = GREEDY,
    client_seed: bool = False,
    cache: dict[str, Any] | None = None,
) -> Plan:
    return make_plan(
        lambda: KEY,
        sampling=sampling,
        client_seed=client_seed,
        headers=[(b"host", b"x"), *((b"cache-control", value.encode("latin-1")) for value in cache_control)],
        options=None if cache is None else CacheOptions.parse(cache),
        default_ttl_s=3600.0,
    )


@pytest.mark.parametrize(
    ("sampling", "client_seed", "cache", "cached"),
    [
        (GREEDY, False, None, True),
        (SamplingParams(temperature=0.0, n=3, prompt_logprobs=2), False, None, True),
        (SAMPLED, False, None, False),
        (SamplingParams(seed=5), True, None, True),
        (SamplingParams(seed=5, n=4), True, None, True),
        (SAMPLED, False, {}, False),
        (SAMPLED, False, {"use": True}, True),
        (SAMPLED, False, {"use": None}, False),
        (SAMPLED, False, {"ttl": 5}, False),
        (GREEDY, False, {"use": False}, False),
        (GREEDY, False, {"no_store": True}, False),
        (SAMPLED, False, {"use": True, "no_store": True}, False),
    ],
)
def test_deterministic_answers_and_those_that_opt_in_are_cached(
    sampling: SamplingParams, client_seed: bool, cache: dict[str, Any] | None, cached: bool
) -> None:
    made = plan(sampling=sampling, client_seed=client_seed, cache=cache)
    assert made.key == (KEY if cached else None)
    assert made.may_read == cached


@pytest.mark.parametrize(
    ("header", "key", "may_read", "only_if_cached", "max_age_s"),
    [
        ("no-store", None, False, False, math.inf),
        ("No-Store", None, False, False, math.inf),
        ("no-cache", KEY, False, False, math.inf),
        ("max-age=0", KEY, False, False, 0),
        ("max-age=10", KEY, True, False, 10),
        ('max-age="10"', KEY, True, False, 10),
        ("max-age=10, max-age=5", KEY, True, False, 5),
        ("only-if-cached", KEY, True, True, math.inf),
        ("only-if-cached, no-store", None, False, True, math.inf),
        ("  no-cache ,, no-transform", KEY, False, False, math.inf),
        # Unknown or malformed: ignored.
        ("", KEY, True, False, math.inf),
        ("max-age", KEY, True, False, math.inf),
        ("max-age=", KEY, True, False, math.inf),
        ("max-age=-1", KEY, True, False, math.inf),
        ("max-age=1.5", KEY, True, False, math.inf),
        ("max-age=" + "9" * 400, KEY, True, False, math.inf),
        ("no-store=1", KEY, True, False, math.inf),
        ("no_store", KEY, True, False, math.inf),
        ("max-stale=9, private, \xff\xfe=;;", KEY, True, False, math.inf),
    ],
)
def test_cache_control(header: str, key: str | None, may_read: bool, only_if_cached: bool, max_age_s: float) -> None:
    made = plan(header)
    assert (made.key, made.may_read, made.only_if_cached) == (key, may_read, only_if_cached)
    if key is not None:
        assert made.max_age_s == max_age_s


def test_several_headers_and_the_body_add_up() -> None:
    assert plan("max-age=10", "no-store").key is None
    assert not plan("max-age=10", cache={"no_cache": True}).may_read
    found = parse_cache_control([(b"cache-control", b"no-cache"), (b"cache-control", b"only-if-cached")])
    assert found.no_cache
    assert found.only_if_cached


def test_time_to_live() -> None:
    assert plan().ttl_s == 3600
    assert plan(cache={"ttl": 0.5}).ttl_s == 0.5
    assert plan(cache={"ttl": 86400}).ttl_s == 86400


def test_a_sampled_answer_that_is_shared_has_a_seed_that_every_process_knows() -> None:
    shared = plan(sampling=SAMPLED, cache={"use": True})
    assert shared.seed == plan(sampling=SAMPLED, cache={"use": True}).seed
    assert shared.sampling(SAMPLED).seed == shared.seed
    assert plan().seed is None
    assert plan().sampling(GREEDY) is GREEDY
    seeded = SamplingParams(seed=5)
    assert plan(sampling=seeded, client_seed=True, cache={"use": True}).sampling(seeded).seed == 5
    # Whoever asks for something new gets another draw.
    assert plan("no-cache", sampling=SAMPLED, cache={"use": True}).seed is None


@pytest.mark.parametrize(
    ("cache", "param"),
    [
        (True, "cache"),
        ("no-store", "cache"),
        ([], "cache"),
        ({"use": 1}, "cache.use"),
        ({"use": "true"}, "cache.use"),
        ({"ttl": "5"}, "cache.ttl"),
        ({"ttl": 0}, "cache.ttl"),
        ({"ttl": -1}, "cache.ttl"),
        ({"ttl": 86401}, "cache.ttl"),
        ({"no_store": 1}, "cache.no_store"),
        ({"no_cache": []}, "cache.no_cache"),
        ({"namespace": "x"}, "cache.namespace"),
    ],
    ids=str,
)
def test_a_wrong_body_is_named(cache: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatBody.parse({"model": "m", "messages": [{"role": "user", "content": "x"}], "cache": cache})
    assert caught.value.param == param
    with pytest.raises(InvalidRequestError) as caught:
        CompletionBody.parse({"model": "m", "prompt": "x", "cache": cache})
    assert caught.value.param == param


def test_the_key_is_not_computed_for_what_bypasses() -> None:
    def fail() -> str:
        raise AssertionError

    make_plan(fail, sampling=SAMPLED, client_seed=False, headers=[], options=None, default_ttl_s=1.0)
    make_plan(
        fail,
        sampling=GREEDY,
        client_seed=False,
        headers=[(b"cache-control", b"no-store")],
        options=None,
        default_ttl_s=1.0,
    )
