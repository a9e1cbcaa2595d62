"""AsyncEngine over an engine in a thread: what clients get, what is refused, how requests end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from penstock.core.errors import (
    AbortedError,
    ConfigError,
    ContextLengthError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
)
from penstock.core.transport import InProcessTransport
from penstock.core.types import Abort, LiveLimits, SamplingParams, Submit
from penstock.serving.frontend.async_engine import AsyncEngine
from penstock.serving.frontend.client import ChatPrompt, Delta, GenerationRequest, Prompt, TextPrompt, TokensPrompt
from penstock.serving.frontend.tokenizer import Tokenizer
from penstock.testing.fake_engine_process import FakeEngine, FakeEngineOptions, expected_output, fake_engine_thread

OPTIONS = FakeEngineOptions(step_s=0.001)
PROMPT = [5, 6, 7]

Running = tuple[AsyncEngine, FakeEngine]


@asynccontextmanager
async def running(
    options: FakeEngineOptions = OPTIONS,
    tokenizer: Tokenizer | None = None,
    *,
    hang_timeout_s: float = 60.0,
    on_hang: Callable[[str], None] | None = None,
) -> AsyncIterator[Running]:
    """A connected AsyncEngine and the engine behind it."""
    transport = InProcessTransport()
    engine = AsyncEngine(tokenizer, hang_timeout_s=hang_timeout_s, ping_interval_s=0.02, on_hang=on_hang)
    with fake_engine_thread(transport.engine, options) as fake:
        await engine.connect(transport.client)
        yield engine, fake
        await engine.close()


@pytest.fixture
def plain() -> AbstractAsyncContextManager[Running]:
    return running()


def make_request(
    prompt: Prompt | None = None, *, request_id: str = "r", timeout_s: float | None = None, **sampling: Any
) -> GenerationRequest:
    settings: dict[str, Any] = {"max_tokens": 10, "seed": 1, **sampling}
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt if prompt is not None else TokensPrompt(PROMPT),
        sampling=SamplingParams(**settings),
        timeout_s=timeout_s,
    )


async def collect(engine: AsyncEngine, request: GenerationRequest) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


def tokens_of(deltas: list[Delta], index: int = 0) -> list[int]:
    """The sample's tokens, after checking that offsets and totals fit together."""
    tokens: list[int] = []
    for delta in deltas:
        if delta.index == index:
            assert delta.offset == len(tokens)
            tokens += delta.token_ids
            assert delta.num_output_tokens == len(tokens)
    return tokens


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


async def refused(engine: AsyncEngine, request: GenerationRequest) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await collect(engine, request)
    return caught.value


# ---- output ----


async def test_tokens_prompt_and_finish_reason(plain: AbstractAsyncContextManager[Running]) -> None:
    async with plain as (engine, _):
        deltas = await collect(engine, make_request())
    assert tokens_of(deltas) == expected_output(OPTIONS, PROMPT, 10, 1)
    assert deltas[0].prompt_token_ids == PROMPT
    assert all(delta.prompt_token_ids is None for delta in deltas[1:])
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    assert {delta.num_prompt_tokens for delta in deltas} == {3}


async def test_text_equals_the_decoded_tokens(byte_level: Tokenizer) -> None:
    async with running(tokenizer=byte_level) as (engine, _):
        deltas = await collect(engine, make_request(TextPrompt("hello"), max_tokens=60))
    assert text_of(deltas) == byte_level.decode(tokens_of(deltas))
    assert deltas[0].prompt_token_ids == byte_level.encode("hello")


async def test_samples_differ_and_all_end(plain: AbstractAsyncContextManager[Running]) -> None:
    async with plain as (engine, _):
        deltas = await collect(engine, make_request(n=3))
    for index in range(3):
        assert tokens_of(deltas, index) == expected_output(OPTIONS, PROMPT, 10, 1, index)
    assert sorted(delta.index for delta in deltas if delta.finish_reason) == [0, 1, 2]
    assert [delta.index for delta in deltas if delta.prompt_token_ids is not None] == [0]


async def test_a_seed_is_drawn_when_none_is_given(plain: AbstractAsyncContextManager[Running]) -> None:
    async with plain as (engine, fake):
        outputs = [
            tokens_of(await collect(engine, make_request(request_id=str(number), seed=None))) for number in range(2)
        ]
    assert outputs[0] != outputs[1]
    assert all(message.request.sampling.seed is not None for message in fake.received if isinstance(message, Submit))


async def test_max_tokens_none_takes_what_is_left() -> None:
    options = FakeEngineOptions(max_model_len=50, eos_token_id=299)
    async with running(options) as (engine, _):
        deltas = await collect(engine, make_request(max_tokens=None))
    assert len(tokens_of(deltas)) == 47


async def test_a_stop_token_ends_without_text(byte_level: Tokenizer) -> None:
    full = expected_output(OPTIONS, PROMPT, 10, 1)
    stop = full[4]
    expected = full[: full.index(stop) + 1]
    async with running(tokenizer=byte_level) as (engine, _):
        deltas = await collect(engine, make_request(stop_token_ids=(stop,)))
        shown = await collect(engine, make_request(stop_token_ids=(stop,), include_stop_str_in_output=True))
    assert tokens_of(deltas) == expected
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    assert text_of(deltas) == byte_level.decode(expected[:-1])
    assert text_of(shown) == byte_level.decode(expected)


@pytest.mark.parametrize("tokens_per_step", [1, 4])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_cuts_text_and_tokens_and_stops_the_engine(
    byte_level: Tokenizer, tokens_per_step: int, include: bool
) -> None:
    # Plain ASCII letters only, so that text and tokens are easy to compare.
    letters = sorted(token for token in range(byte_level.vocab_size) if byte_level.decode([token]).isalpha())
    low = next(start for start in letters if all(start + step in letters for step in range(20)))
    options = FakeEngineOptions(
        low_token=low, num_tokens=20, step_s=0.001, tokens_per_step=tokens_per_step, vocab_size=400
    )
    full = expected_output(options, PROMPT, 200, 1)
    text = byte_level.decode(full)
    stop = text[30:33]
    at = text.index(stop)
    async with running(options, byte_level) as (engine, fake):
        deltas = await collect(engine, make_request(stop=(stop, "never there"), max_tokens=200, n=2))
        expected = text[: at + 3] if include else text[:at]
        again = await collect(
            engine, make_request(stop=(stop,), max_tokens=200, include_stop_str_in_output=include, request_id="s")
        )
        aborts = [message for message in fake.received if isinstance(message, Abort)]
    assert text_of(deltas) == text[:at]
    last = next(delta for delta in deltas if delta.index == 0 and delta.finish_reason)
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert byte_level.decode(tokens_of(deltas)).startswith(text[: at + 3])
    assert len(tokens_of(deltas)) < 40
    assert text_of(again) == expected
    assert Abort(["r"], [0]) in aborts


async def test_stop_strings_count_from_min_tokens_on(byte_level: Tokenizer) -> None:
    full = expected_output(OPTIONS, PROMPT, 40, 1)
    first = byte_level.decode(full[:1])
    async with running(tokenizer=byte_level) as (engine, _):
        deltas = await collect(engine, make_request(stop=(first,), min_tokens=5, max_tokens=40))
    assert len(tokens_of(deltas)) >= 5


async def test_logprobs_are_spelled(byte_level: Tokenizer) -> None:
    async with running(tokenizer=byte_level) as (engine, _):
        deltas = await collect(engine, make_request(logprobs=1, prompt_logprobs=0, max_tokens=5))
    entries = [entry for delta in deltas for entry in delta.logprobs or []]
    assert [entry.token_id for entry in entries] == tokens_of(deltas)
    assert b"".join(entry.token_bytes for entry in entries).decode("utf-8", "replace") == text_of(deltas)
    assert entries[0].top[0].token_id == entries[0].token_id
    prompt = deltas[0].prompt_logprobs
    assert prompt is not None
    assert [entry.logprob for entry in prompt] == [None, -2.0, -2.0]


async def test_max_tokens_zero_reports_the_prompt(plain: AbstractAsyncContextManager[Running]) -> None:
    async with plain as (engine, _):
        deltas = await collect(engine, make_request(max_tokens=0, prompt_logprobs=1))
    assert len(deltas) == 1
    assert deltas[0].token_ids == []
    assert deltas[0].finish_reason == "length"
    assert deltas[0].prompt_logprobs is not None
    assert len(deltas[0].prompt_logprobs) == 3


async def test_a_slow_reader_gets_everything_and_slows_nobody(plain: AbstractAsyncContextManager[Running]) -> None:
    async with plain as (engine, _):
        slow = engine.generate(make_request(max_tokens=200))
        first = await anext(slow)
        await collect(engine, make_request(request_id="fast", max_tokens=200))
        await asyncio.sleep(0.05)
        rest = [delta async for delta in slow]
    assert tokens_of([first, *rest]) == expected_output(OPTIONS, PROMPT, 200, 1)
    assert len(rest) <= 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        (TokensPrompt([]), {}, "prompt"),
        (TokensPrompt([1, 300]), {}, "prompt"),
        (TokensPrompt([-1]), {}, "prompt"),
        (TextPrompt("text"), {}, "prompt"),
        (ChatPrompt([{"role": "user", "content": "x"}]), {}, "messages"),
        (None, {"stop": ("x",)}, "stop"),
        (None, {"logit_bias": {300: 1.0}}, "logit_bias"),
        (None, {"stop_token_ids": (-1,)}, "stop_token_ids"),
        (None, {"allowed_token_ids": (1, 300)}, "allowed_token_ids"),
    ],
)
async def test_a_bad_field_is_named(
    plain: AbstractAsyncContextManager[Running], prompt: Prompt | None, sampling: dict[str, Any], param: str
) -> None:
    async with plain as (engine, fake):
        error = await refused(engine, make_request(prompt, **sampling))
        assert not any(isinstance(message, Submit) for message in fake.received)
    assert isinstance(error, InvalidRequestError)
    assert error.param == param


@pytest.mark.parametrize(("length", "max_tokens"), [(3, 1000), (1000, None), (2000, 0), (1001, 5)])
async def test_too_long_says_the_numbers(
    plain: AbstractAsyncContextManager[Running], length: int, max_tokens: int | None
) -> None:
    async with plain as (engine, _):
        error = await refused(engine, make_request(TokensPrompt([1] * length), max_tokens=max_tokens))
    assert isinstance(error, ContextLengthError)
    for number in (length, 1000, 2000):
        assert str(number) in error.message


async def test_a_chat_that_is_too_long_names_its_messages(byte_level: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello " * 2000}]
    async with running(FakeEngineOptions(vocab_size=400), byte_level) as (engine, _):
        error = await refused(engine, make_request(ChatPrompt(messages)))
    assert isinstance(error, ContextLengthError)
    assert error.param == "messages"


async def test_the_cache_limits_too() -> None:
    async with running(FakeEngineOptions(kv_cache_tokens=64)) as (engine, _):
        error = await refused(engine, make_request(max_tokens=100))
    assert isinstance(error, ContextLengthError)
    assert "64" in error.message


# ---- tokenize, limits, statistics ----


async def test_tokenize_and_detokenize(byte_level: Tokenizer) -> None:
    async with running(tokenizer=byte_level) as (engine, _):
        ids = await engine.tokenize(TextPrompt("hello " * 2000))
        assert await engine.detokenize(ids) == "<s>" + "hello " * 2000
        assert await engine.tokenize(ChatPrompt([{"role": "user", "content": "x"}])) == byte_level.encode_chat(
            [{"role": "user", "content": "x"}]
        )
        assert await engine.tokenize(TokensPrompt([1, 2])) == [1, 2]
        with pytest.raises(InvalidRequestError):
            await engine.tokenize(TokensPrompt([10_000]))
        with pytest.raises(InvalidRequestError):
            await engine.detokenize([10_000])


async def test_limits_change_live_up_to_the_ceiling(plain: AbstractAsyncContextManager[Running]) -> None:
    async with plain as (engine, _):
        limits = await engine.configure(LiveLimits(max_num_seqs=2))
        assert limits.max_num_seqs == 2
        with pytest.raises(InvalidRequestError) as caught:
            await engine.configure(LiveLimits(max_num_seqs=65))
        assert caught.value.param == "max_num_seqs"


async def test_model_info_stats_and_health(plain: AbstractAsyncContextManager[Running]) -> None:
    engine = AsyncEngine(None)
    with pytest.raises(EngineDeadError):
        await engine.model_info()
    assert await engine.stats() is None
    assert not engine.health().ready
    await engine.close()
    async with plain as (engine, _):
        assert (await engine.model_info()).architecture == "fake"
        await collect(engine, make_request())
        await asyncio.sleep(0.06)
        stats = await engine.stats()
        assert stats is not None
        assert stats.steps >= 10
        assert engine.health().ready


async def test_a_start_up_failure_gives_the_reason() -> None:
    transport = InProcessTransport()
    engine = AsyncEngine(None)
    with (
        fake_engine_thread(transport.engine, FakeEngineOptions(startup_failure="no memory; use a smaller model")),
        pytest.raises(ConfigError, match="no memory"),
    ):
        await engine.connect(transport.client)


# ---- how requests end early ----


def engine_has(fake: FakeEngine, request_id: str) -> bool:
    return any(sample.request.request_id == request_id for sample in list(fake._samples))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_closing_the_iterator_aborts(plain: AbstractAsyncContextManager[Running]) -> None:
    async with plain as (engine, fake):
        stream = engine.generate(make_request(max_tokens=900))
        await anext(stream)
        assert engine_has(fake, "r")
        await stream.aclose()  # type: ignore[attr-defined]
        await eventually(lambda: not engine_has(fake, "r"))


async def test_cancelling_the_reader_aborts(plain: AbstractAsyncContextManager[Running]) -> None:
    async with plain as (engine, fake):
        reader = asyncio.create_task(collect(engine, make_request(max_tokens=900)))
        await eventually(lambda: engine_has(fake, "r"))
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await eventually(lambda: not engine_has(fake, "r"))


async def test_abort_by_id_raises_in_the_reader(plain: AbstractAsyncContextManager[Running]) -> None:
    async with plain as (engine, fake):
        reader = asyncio.create_task(collect(engine, make_request(max_tokens=900)))
        await eventually(lambda: engine_has(fake, "r"))
        await engine.abort("unknown")
        await engine.abort("r")
        with pytest.raises(AbortedError):
            await reader
        await eventually(lambda: not engine_has(fake, "r"))


async def test_a_deadline_ends_the_request() -> None:
    async with running(FakeEngineOptions(step_s=0.02)) as (engine, fake):
        with pytest.raises(DeadlineExceededError):
            await collect(engine, make_request(max_tokens=900, timeout_s=0.1))
        await eventually(lambda: not engine_has(fake, "r"))


async def test_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async with running(FakeEngineOptions(step_s=0.005)) as (engine, _):
        reader = asyncio.create_task(collect(engine, make_request(max_tokens=20)))
        await asyncio.sleep(0.02)
        drain = asyncio.create_task(engine.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await collect(engine, make_request(request_id="late"))
        assert not engine.health().ready
        await drain
        assert len(tokens_of(await reader)) == 20


async def test_drain_aborts_what_is_not_done_in_time() -> None:
    async with running(FakeEngineOptions(step_s=0.02)) as (engine, _):
        reader = asyncio.create_task(collect(engine, make_request(max_tokens=900)))
        await asyncio.sleep(0.05)
        await engine.drain(0.05)
        with pytest.raises(AbortedError):
            await reader


async def test_a_hung_engine_is_reported_once_and_turns_readiness_off() -> None:
    reports: list[str] = []
    options = FakeEngineOptions(hang_token=9, fault_after=2)
    async with running(options, hang_timeout_s=0.4, on_hang=reports.append) as (engine, _):
        await asyncio.sleep(0.6)
        assert engine.health().ready, "an idle engine that answers does not hang"
        reader = asyncio.create_task(collect(engine, make_request(TokensPrompt([9]))))
        await eventually(lambda: bool(reports))
        await asyncio.sleep(0.1)
        assert len(reports) == 1
        assert not engine.health().ready
        engine.engine_gone("it hung")
        with pytest.raises(EngineDeadError):
            await reader


async def test_a_silent_idle_engine_hangs_too() -> None:
    async with running(hang_timeout_s=0.4) as (engine, fake):
        fake.stop.set()
        await eventually(lambda: not engine.health().ready)
        with pytest.raises(EngineDeadError):
            await collect(engine, make_request())


async def test_many_requests_at_once_each_get_their_own() -> None:
    options = FakeEngineOptions(max_num_seqs=16)
    async with running(options) as (engine, _):
        prompts = [[number % 250, number // 250, 3] for number in range(200)]
        streams = [
            collect(engine, make_request(TokensPrompt(prompt), request_id=str(number), max_tokens=20))
            for number, prompt in enumerate(prompts)
        ]
        results = await asyncio.gather(*streams)
        assert engine.health().details["requests"] == 0
    assert [tokens_of(deltas) for deltas in results] == [expected_output(options, prompt, 20, 1) for prompt in prompts]
