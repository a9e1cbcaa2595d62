"""Streams through real crashes of a real engine process: every token is the one of an uninterrupted run."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import psutil
import pytest

from penstock.core.errors import EngineDeadError, EngineError
from penstock.core.transport import SocketDirectory
from penstock.core.types import SamplingParams
from penstock.serving.cluster.supervisor import EngineSupervisor
from penstock.serving.frontend.async_engine import AsyncEngine
from penstock.serving.frontend.client import GenerationRequest, TokensPrompt
from penstock.testing.fake_engine_process import FakeEngineOptions, expected_output

POISON = 250


@asynccontextmanager
async def serving(
    options: FakeEngineOptions, *, hang_timeout_s: float = 60.0, max_restarts: int = 5
) -> AsyncIterator[tuple[AsyncEngine, EngineSupervisor]]:
    """The engine process, supervised, behind an AsyncEngine, wired as the server does it."""
    command = [
        sys.executable,
        "-m",
        "penstock.testing.fake_engine_process",
        "--options",
        msgspec.json.encode(options).decode(),
    ]
    engine = AsyncEngine(None, hang_timeout_s=hang_timeout_s, ping_interval_s=0.05)
    with SocketDirectory() as sockets:
        supervisor = EngineSupervisor(
            command,
            new_address=sockets.new_address,
            on_ready=engine.engine_ready,
            on_lost=engine.engine_lost,
            on_gone=engine.engine_gone,
            finished_requests=lambda: engine.finished_requests,
            max_restarts=max_restarts,
            first_backoff_s=0.01,
        )
        engine.on_hang = supervisor.kill
        await supervisor.start()
        yield engine, supervisor
        pid = supervisor.engine_pid
        await engine.close()
        await supervisor.stop()
        assert pid is None or not psutil.pid_exists(pid)


async def generate(
    engine: AsyncEngine, name: str, prompt: list[int], *, length: int = 60, n: int = 1
) -> list[list[int]]:
    """The tokens of each sample, checked for gaps and repetitions."""
    request = GenerationRequest(
        request_id=name,
        prompt=TokensPrompt(prompt),
        sampling=SamplingParams(max_tokens=length, seed=11, n=n, ignore_eos=True),
    )
    outputs: list[list[int]] = [[] for _ in range(n)]
    finished = 0
    async for delta in engine.generate(request):
        assert delta.offset == len(outputs[delta.index])
        outputs[delta.index] += delta.token_ids
        finished += delta.finish_reason is not None
    assert finished == n
    return outputs


def kill(supervisor: EngineSupervisor) -> None:
    assert supervisor.engine_pid is not None
    os.kill(supervisor.engine_pid, signal.SIGKILL)


async def test_64_streams_continue_exactly_after_kill_9() -> None:
    options = FakeEngineOptions(step_s=0.01, max_num_seqs=48)
    async with serving(options) as (engine, supervisor):
        prompts = [[number, 7, 7] for number in range(64)]
        streams = [
            asyncio.create_task(generate(engine, str(number), prompt, n=1 + number % 2))
            for number, prompt in enumerate(prompts)
        ]
        await asyncio.sleep(0.25)
        assert not any(stream.done() for stream in streams)
        kill(supervisor)
        results = await asyncio.gather(*streams)
        assert engine.engine_starts == 2
        assert engine.health().ready
    for number, (prompt, outputs) in enumerate(zip(prompts, results, strict=True)):
        assert len(outputs) == 1 + number % 2
        for index, output in enumerate(outputs):
            assert output == expected_output(options, prompt, 60, 11, index)


async def test_two_crashes_end_a_request_with_a_clear_error_and_the_server_lives_on() -> None:
    options = FakeEngineOptions(step_s=0.01)
    async with serving(options) as (engine, supervisor):
        stream = asyncio.create_task(generate(engine, "r", [1, 2], length=900))
        for starts in (1, 2):
            await reached(engine, starts)
            await asyncio.sleep(0.1)
            kill(supervisor)
        with pytest.raises(EngineError, match="crashed twice") as caught:
            await stream
        assert caught.value.code == "engine_crashed"
        assert await generate(engine, "next", [3]) == [expected_output(options, [3], 60, 11)]


@pytest.mark.parametrize("fault_after", [0, 5])
async def test_a_poisonous_request_takes_two_engines_and_no_bystander_in_the_queue(fault_after: int) -> None:
    """Four run at once; the poison is behind eight others, so what waits behind it never shared an engine's batch with it twice."""
    options = FakeEngineOptions(step_s=0.002, max_num_seqs=4, poison_token=POISON, fault_after=fault_after)
    async with serving(options) as (engine, _):
        names = [f"{number}" for number in range(24)]
        prompts = [[number, POISON if number == 8 else 3] for number in range(24)]
        streams = [generate(engine, name, prompt, length=30) for name, prompt in zip(names, prompts, strict=True)]
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert engine.engine_starts == 3
    failed = [number for number, result in enumerate(results) if isinstance(result, BaseException)]
    assert 8 in failed
    # Beside the poison only what ran in the same engine both times can have ended.
    assert len(failed) <= 8
    for number, result in enumerate(results):
        if isinstance(result, BaseException):
            assert isinstance(result, EngineError)
            assert result.code == "engine_crashed"
        else:
            assert result == [expected_output(options, prompts[number], 30, 11)]


@pytest.mark.parametrize("silently", [False, True])
async def test_a_hung_engine_is_killed_and_streams_that_came_between_continue(silently: bool) -> None:
    options = FakeEngineOptions(step_s=0.005, hang_token=POISON, fault_after=3, hang_silently=silently)
    async with serving(options, hang_timeout_s=0.6) as (engine, _):
        before = asyncio.create_task(generate(engine, "before", [1], length=30))
        guilty = asyncio.create_task(generate(engine, "guilty", [POISON], length=100))
        await reached(engine, 2)
        between = asyncio.create_task(generate(engine, "between", [2], length=100))
        with pytest.raises(EngineError) as caught:
            await guilty
        assert caught.value.code == "engine_crashed"
        assert await between == [expected_output(options, [2], 100, 11)]
        assert engine.engine_starts == 3
        # It shared both engines with the one that hangs.
        with pytest.raises(EngineError):
            await before


async def test_when_the_supervisor_gives_up_requests_get_503() -> None:
    options = FakeEngineOptions(step_s=0.01)
    async with serving(options, max_restarts=0) as (engine, supervisor):
        stream = asyncio.create_task(generate(engine, "r", [1], length=900))
        await asyncio.sleep(0.1)
        kill(supervisor)
        with pytest.raises(EngineDeadError):
            await stream
        with pytest.raises(EngineDeadError):
            await generate(engine, "next", [1])
        assert not engine.health().ready


async def reached(engine: AsyncEngine, starts: int) -> None:
    async with asyncio.timeout(10):
        while engine.engine_starts < starts or not engine.health().ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
