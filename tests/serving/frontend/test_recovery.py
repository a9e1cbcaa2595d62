"""Generations survive engines: nothing lost, nothing doubled, and nobody takes an engine down for ever.

The engine's side is written by hand here, message by message.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import EngineDeadError, EngineError, OverloadedError, RequestError
from penstock.core.types import (
    Abort,
    Configure,
    Configured,
    Deltas,
    EngineRequest,
    FinishReason,
    FromEngine,
    Hello,
    LiveLimits,
    ModelInfo,
    SampleStart,
    SamplingParams,
    Submit,
    ToEngine,
    TokenDelta,
    TokenLogprobs,
)
from penstock.serving.frontend.async_engine import AsyncEngine
from penstock.serving.frontend.client import Delta, GenerationRequest, TokensPrompt


class HandEngine:
    """A ClientEndpoint whose other end is the test."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.closed = False
        self.full = False
        self._inbox: asyncio.Queue[FromEngine] = asyncio.Queue()

    def send(self, message: ToEngine) -> None:
        if self.full:
            raise OverloadedError("full")
        self.sent.append(message)

    async def receive(self) -> FromEngine:
        return await self._inbox.get()

    def close(self) -> None:
        self.closed = True

    async def say(self, message: FromEngine) -> None:
        """Send, and let the client handle it."""
        self._inbox.put_nowait(message)
        for _ in range(5):
            await asyncio.sleep(0)

    async def tokens(
        self,
        request_id: str,
        offset: int,
        ids: list[int],
        *,
        attempt: int = 0,
        index: int = 0,
        finish: FinishReason | None = None,
        **fields: Any,
    ) -> None:
        delta = TokenDelta(request_id, attempt, index, offset, ids, finish_reason=finish, **fields)
        await self.say(Deltas([delta]))

    @property
    def submitted(self) -> list[EngineRequest]:
        return [message.request for message in self.sent if isinstance(message, Submit)]

    @property
    def submitted_ids(self) -> list[str]:
        return [request.request_id for request in self.submitted]


def hello(model_hash: str = "m") -> Hello:
    model = ModelInfo(
        architecture="hand",
        dtype="float32",
        device="cpu",
        vocab_size=1000,
        max_model_len=500,
        eos_token_ids=(),
        num_parameters=0,
        weight_bytes=0,
        model_hash=model_hash,
        kv_cache_tokens=500,
    )
    return Hello(model, [])


class Reader:
    """Collects one request's deltas in the background."""

    def __init__(self, engine: AsyncEngine, request_id: str = "r", **sampling: Any) -> None:
        settings: dict[str, Any] = {"max_tokens": 10, "seed": 3, **sampling}
        self.request = GenerationRequest(
            request_id=request_id, prompt=TokensPrompt([1, 2, 3]), sampling=SamplingParams(**settings)
        )
        self.deltas: list[Delta] = []
        self.task = asyncio.create_task(self._read(engine))

    async def _read(self, engine: AsyncEngine) -> None:
        async for delta in engine.generate(self.request):
            self.deltas.append(delta)

    def tokens(self, index: int = 0) -> list[int]:
        tokens: list[int] = []
        for delta in self.deltas:
            if delta.index == index:
                assert delta.offset == len(tokens)
                tokens += delta.token_ids
        return tokens

    async def error(self) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await asyncio.wait_for(self.task, 2)
        return caught.value


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def start(engine: AsyncEngine, model_hash: str = "m") -> HandEngine:
    hand = HandEngine()
    engine.engine_ready(hand, hello(model_hash))
    return hand


@pytest.fixture
def engine() -> AsyncEngine:
    return AsyncEngine(None, restart_wait_s=0.2, ping_interval_s=5)


async def test_a_stream_goes_on_where_it_was(engine: AsyncEngine) -> None:
    first = start(engine)
    reader = Reader(engine)
    await settle()
    assert first.submitted[0].samples == [SampleStart(0)]
    assert first.submitted[0].attempt == 0
    await first.tokens("r", 0, [10, 11])
    engine.engine_lost("killed")
    assert first.closed
    second = start(engine)
    assert engine.health().details["restarts"] == 1
    again = second.submitted[0]
    assert (again.attempt, again.samples, again.sampling.seed) == (1, [SampleStart(0, [10, 11])], 3)
    await second.tokens("r", 2, [12], attempt=1)
    await second.tokens("r", 3, [13], attempt=1, finish="length")
    await asyncio.wait_for(reader.task, 2)
    assert reader.tokens() == [10, 11, 12, 13]
    assert sum(delta.prompt_token_ids is not None for delta in reader.deltas) == 1
    await engine.close()


async def test_only_unfinished_samples_are_resumed(engine: AsyncEngine) -> None:
    first = start(engine)
    reader = Reader(engine, n=2)
    await settle()
    await first.tokens("r", 0, [10], index=1, finish="stop")
    await first.tokens("r", 0, [20], index=0)
    engine.engine_lost("killed")
    second = start(engine)
    assert second.submitted[0].samples == [SampleStart(0, [20])]
    await second.tokens("r", 1, [21], attempt=1, finish="length")
    await asyncio.wait_for(reader.task, 2)
    assert (reader.tokens(0), reader.tokens(1)) == ([20, 21], [10])
    await engine.close()


async def test_late_attempts_are_dropped_and_repeated_tokens_trimmed(engine: AsyncEngine) -> None:
    start(engine)
    reader = Reader(engine, logprobs=0)
    await settle()
    engine.engine_lost("killed")
    second = start(engine)
    await second.tokens("r", 0, [99], attempt=0)
    logprobs = [TokenLogprobs(token, -float(token), 1) for token in (10, 11, 12)]
    await second.tokens("r", 0, [10, 11], attempt=1, logprobs=logprobs[:2])
    await second.tokens("r", 0, [10, 11, 12], attempt=1, logprobs=logprobs)
    await second.tokens("r", 3, [], attempt=1, finish="stop")
    await asyncio.wait_for(reader.task, 2)
    assert reader.tokens() == [10, 11, 12]
    assert [entry.token_id for delta in reader.deltas for entry in delta.logprobs or []] == [10, 11, 12]
    await engine.close()


async def test_a_gap_ends_the_request_and_stops_the_engine_on_it(engine: AsyncEngine) -> None:
    hand = start(engine)
    reader = Reader(engine)
    await settle()
    await hand.tokens("r", 1, [10])
    error = await reader.error()
    assert isinstance(error, EngineError)
    assert error.code == "engine_gap"
    assert Abort(["r"]) in hand.sent
    await engine.close()


async def test_prompt_logprobs_are_not_asked_for_twice(engine: AsyncEngine) -> None:
    first = start(engine)
    reader = Reader(engine, prompt_logprobs=0)
    await settle()
    prompt_logprobs = [None, TokenLogprobs(2, -1.0, 1), TokenLogprobs(3, -1.0, 1)]
    await first.tokens("r", 0, [10], prompt_logprobs=prompt_logprobs)
    engine.engine_lost("killed")
    second = start(engine)
    assert second.submitted[0].sampling.prompt_logprobs is None
    await second.tokens("r", 1, [11], attempt=1, finish="length")
    await asyncio.wait_for(reader.task, 2)
    assert sum(delta.prompt_logprobs is not None for delta in reader.deltas) == 1
    await engine.close()


async def test_the_second_crash_ends_a_request(engine: AsyncEngine) -> None:
    hand = start(engine)
    reader = Reader(engine)
    await settle()
    await hand.tokens("r", 0, [10])
    engine.engine_lost("killed")
    start(engine)
    engine.engine_lost("killed")
    error = await reader.error()
    assert (error.status, error.code) == (500, "engine_crashed")
    assert start(engine).submitted == []
    await engine.close()


async def test_an_engine_lost_while_starting_counts_for_nobody(engine: AsyncEngine) -> None:
    hand = start(engine)
    reader = Reader(engine)
    await settle()
    await hand.tokens("r", 0, [10])
    for _ in range(3):
        engine.engine_lost("killed, then failed to start")
    hand = start(engine)
    await hand.tokens("r", 1, [11], attempt=1, finish="length")
    await asyncio.wait_for(reader.task, 2)
    assert reader.tokens() == [10, 11]
    await engine.close()


async def test_what_never_showed_output_is_replayed_in_growing_groups(engine: AsyncEngine) -> None:
    first = start(engine)
    running = [Reader(engine, f"running-{number}") for number in range(2)]
    await settle()
    for number in range(2):
        await first.tokens(f"running-{number}", 0, [10])
    waiting = [Reader(engine, f"waiting-{number}") for number in range(7)]
    await settle()
    assert len(first.submitted) == 9
    engine.engine_lost("killed")
    second = start(engine)
    assert second.submitted_ids == ["running-0", "running-1", "waiting-0"]
    await second.tokens("waiting-0", 0, [1], attempt=1)
    assert second.submitted_ids[3:] == ["waiting-1", "waiting-2"]
    await second.tokens("waiting-1", 0, [1], attempt=1, finish="stop")
    assert len(second.submitted) == 5
    # The one that kills engines is among the group of now: only what runs is in its second crash.
    engine.engine_lost("killed")
    for reader in [*running, waiting[0], waiting[2]]:
        assert (await reader.error()).code == "engine_crashed"
    await asyncio.wait_for(waiting[1].task, 2)
    third = start(engine)
    assert third.submitted_ids == ["waiting-3"]
    await third.tokens("waiting-3", 0, [1], attempt=1, finish="stop")
    assert third.submitted_ids == ["waiting-3", "waiting-4", "waiting-5"]
    await engine.close()
    await asyncio.gather(*(reader.task for reader in waiting), return_exceptions=True)


async def test_an_aborted_member_does_not_hold_its_group_up(engine: AsyncEngine) -> None:
    start(engine)
    readers = [Reader(engine, name) for name in ("a", "b", "c", "d")]
    await settle()
    engine.engine_lost("killed")
    second = start(engine)
    assert second.submitted_ids == ["a"]
    await engine.abort("b")
    await engine.abort("a")
    assert second.submitted_ids == ["a", "c", "d"]
    await engine.close()
    await asyncio.gather(*(reader.task for reader in readers), return_exceptions=True)


async def test_another_model_does_not_continue_a_stream(engine: AsyncEngine) -> None:
    hand = start(engine)
    reader = Reader(engine)
    await settle()
    await hand.tokens("r", 0, [10])
    engine.engine_lost("killed")
    second = start(engine, "another")
    assert (await reader.error()).code == "model_changed"
    assert second.submitted == []
    assert (await engine.model_info()).model_hash == "another"
    await engine.close()


async def test_new_requests_wait_for_the_engine_but_not_for_ever(engine: AsyncEngine) -> None:
    start(engine)
    engine.engine_lost("killed")
    assert not engine.health().ready
    patient = Reader(engine, "patient")
    await asyncio.sleep(0.05)
    hand = start(engine)
    await settle()
    assert hand.submitted_ids == ["patient"]
    await hand.tokens("patient", 0, [1], finish="length")
    await asyncio.wait_for(patient.task, 2)
    engine.engine_lost("killed")
    error = await Reader(engine, "late").error()
    assert isinstance(error, EngineDeadError)
    await engine.close()


async def test_when_the_engine_is_gone_everything_ends(engine: AsyncEngine) -> None:
    start(engine)
    reader = Reader(engine)
    await settle()
    engine.engine_lost("killed")
    parked = Reader(engine, "parked")
    await settle()
    engine.engine_gone("it crashed too often")
    for waiting in (reader, parked, Reader(engine, "new")):
        error = await waiting.error()
        assert error.status == 503
        assert "it crashed too often" in error.message
    assert engine.health().reason == "it crashed too often"
    await engine.close()


async def test_too_many_parked_requests_are_refused() -> None:
    engine = AsyncEngine(None, restart_wait_s=5, max_parked=1)
    parked = Reader(engine, "parked")
    await settle()
    assert isinstance(await Reader(engine, "more").error(), OverloadedError)
    await engine.close()
    assert isinstance(await parked.error(), EngineDeadError)


async def test_an_aborted_parked_request_ends(engine: AsyncEngine) -> None:
    parked = Reader(engine, "parked")
    await settle()
    await engine.abort("parked")
    hand = start(engine)
    assert (await parked.error()).status == 499
    assert hand.submitted == []
    await engine.close()


async def test_limits_set_live_are_set_again_on_a_new_engine(engine: AsyncEngine) -> None:
    hand = start(engine)
    call = asyncio.create_task(engine.configure(LiveLimits(max_num_seqs=3)))
    await settle()
    configure = next(message for message in hand.sent if isinstance(message, Configure))
    await hand.say(Configured(configure.call_id, LiveLimits(max_num_seqs=3, max_num_batched_tokens=9)))
    assert (await call).max_num_batched_tokens == 9
    engine.engine_lost("killed")
    second = start(engine)
    assert [message.limits for message in second.sent if isinstance(message, Configure)] == [LiveLimits(max_num_seqs=3)]
    await engine.close()


async def test_configure_ends_with_the_engine(engine: AsyncEngine) -> None:
    start(engine)
    call = asyncio.create_task(engine.configure(LiveLimits(max_num_seqs=3)))
    await settle()
    engine.engine_lost("killed")
    with pytest.raises(EngineDeadError):
        await call
    await engine.close()


async def test_a_full_queue_refuses_the_request_and_keeps_aborts(engine: AsyncEngine) -> None:
    engine = AsyncEngine(None, ping_interval_s=0.02)
    hand = start(engine)
    reader = Reader(engine)
    await settle()
    hand.full = True
    assert isinstance(await Reader(engine, "more").error(), OverloadedError)
    await engine.abort("r")
    assert (await reader.error()).status == 499
    hand.full = False
    await asyncio.sleep(0.06)
    assert Abort(["r"]) in hand.sent
    await engine.close()


async def test_an_engine_that_ends_a_request_by_itself_says_retry(engine: AsyncEngine) -> None:
    hand = start(engine)
    reader = Reader(engine)
    await settle()
    await hand.tokens("r", 0, [], finish="abort")
    error = await reader.error()
    assert (error.status, error.code) == (503, "engine_aborted")
    await engine.close()


async def test_after_a_long_stop_of_this_process_requests_are_submitted_again() -> None:
    engine = AsyncEngine(None, ping_interval_s=0.01, pause_limit_s=0.3)
    hand = start(engine)
    reader = Reader(engine)
    await settle()
    await hand.tokens("r", 0, [10])
    await asyncio.sleep(0.05)
    assert len(hand.submitted) == 1
    time.sleep(0.4)  # noqa: ASYNC251  the whole process stands still
    await asyncio.sleep(0.05)
    assert hand.sent.index(Abort(["r"])) < hand.sent.index(Submit(hand.submitted[1]))
    assert (hand.submitted[1].attempt, hand.submitted[1].samples) == (1, [SampleStart(0, [10])])
    await hand.tokens("r", 1, [], attempt=0, finish="abort")
    await hand.tokens("r", 1, [11], attempt=1, finish="length")
    await asyncio.wait_for(reader.task, 2)
    assert reader.tokens() == [10, 11]
    await engine.close()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    events=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), max_size=40),
    crash_at=st.integers(0, 40),
    overlap=st.integers(0, 3),
)
def test_any_interleaving_with_one_crash_gives_every_request_its_exact_tokens(
    lengths: list[int], events: list[tuple[int, int]], crash_at: int, overlap: int
) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(None, ping_interval_s=5)
        hand = start(engine)
        readers = [Reader(engine, str(number), max_tokens=length) for number, length in enumerate(lengths)]
        await settle()
        known = [0] * len(lengths)

        async def advance(number: int, count: int) -> None:
            attempts = [request.attempt for request in hand.submitted if request.request_id == str(number)]
            if not attempts or known[number] == lengths[number]:
                return
            begin = max(0, known[number] - overlap)
            known[number] = min(lengths[number], known[number] + count)
            finish: FinishReason | None = "length" if known[number] == lengths[number] else None
            tokens = list(range(begin, known[number]))
            await hand.tokens(str(number), begin, tokens, attempt=attempts[-1], finish=finish)

        for step, (number, count) in enumerate(events):
            if step == crash_at:
                engine.engine_lost("killed")
                hand = start(engine)
            await advance(number % len(lengths), count)
        # Replays come in groups, so later ones may need several rounds.
        for _ in range(len(lengths)):
            for number in range(len(lengths)):
                await advance(number, 100)
        async with asyncio.timeout(5):
            await asyncio.gather(*(reader.task for reader in readers))
        assert [reader.tokens() for reader in readers] == [list(range(length)) for length in lengths]
        assert all(reader.deltas[-1].finish_reason == "length" for reader in readers)
        await engine.close()

    asyncio.run(scenario())
