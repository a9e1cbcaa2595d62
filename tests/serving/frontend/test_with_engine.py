"""AsyncEngine with the real engine loop and scheduler, over a fake executor: the two sides understand each other."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from penstock.core.errors import DeadlineExceededError
from penstock.core.transport import InProcessTransport
from penstock.core.types import Connect, Hello, SamplingParams
from penstock.engine.engine import Engine
from penstock.engine.process import EngineLoop
from penstock.serving.frontend.async_engine import AsyncEngine
from penstock.serving.frontend.client import GenerationRequest, TokensPrompt
from penstock.testing.builders import make_engine
from penstock.testing.fake_executor import FakeExecutor
from penstock.testing.fake_model import expected_tokens

VOCAB_SIZE = 997


@contextmanager
def engine_thread(max_inflight: int) -> Iterator[tuple[InProcessTransport, Engine, EngineLoop]]:
    transport = InProcessTransport()
    engine = make_engine(FakeExecutor(max_inflight=max_inflight, num_blocks=96))
    loop = EngineLoop(engine, transport.engine, [])
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    try:
        yield transport, engine, loop
    finally:
        loop.stop()
        thread.join(timeout=10)
        assert not thread.is_alive()


@asynccontextmanager
async def client_for(transport: InProcessTransport) -> AsyncIterator[AsyncEngine]:
    client = AsyncEngine(None)
    await client.connect(transport.client)
    yield client
    await client.close()


def make_request(number: int, *, n: int = 1) -> GenerationRequest:
    """Prompt and length of any size, both decided by `number`."""
    rng = random.Random(number)
    prompt = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
    sampling = SamplingParams(max_tokens=rng.randrange(1, 40), seed=number, ignore_eos=True, n=n)
    return GenerationRequest(request_id=f"r{number}", prompt=TokensPrompt(prompt), sampling=sampling)


async def outputs(client: AsyncEngine, request: GenerationRequest) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in range(request.sampling.n)]
    async for delta in client.generate(request):
        assert delta.offset == len(tokens[delta.index])
        tokens[delta.index] += delta.token_ids
    return tokens


def expected(request: GenerationRequest) -> list[list[int]]:
    assert isinstance(request.prompt, TokensPrompt)
    prompt = list(request.prompt.token_ids)
    return [expected_tokens(prompt, request.sampling, VOCAB_SIZE, index) for index in range(request.sampling.n)]


@pytest.mark.parametrize("max_inflight", [1, 2])
async def test_many_requests_and_samples(max_inflight: int) -> None:
    requests = [make_request(number) for number in range(30)] + [make_request(99, n=4)]
    with engine_thread(max_inflight) as (transport, _, _):
        async with client_for(transport) as client:
            results = await asyncio.gather(*(outputs(client, request) for request in requests))
    assert results == [expected(request) for request in requests]


@pytest.mark.parametrize("max_inflight", [1, 2])
async def test_streams_move_to_another_engine(max_inflight: int) -> None:
    requests = [make_request(number) for number in range(30)] + [make_request(99, n=4)]
    client = AsyncEngine(None)
    with engine_thread(max_inflight) as (first, _, loop):
        await client.connect(first.client)
        tasks = [asyncio.create_task(outputs(client, request)) for request in requests]
        while client.finished_requests < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        loop.stop()
        client.engine_lost("stopped by the test")
    assert not all(task.done() for task in tasks)
    with engine_thread(max_inflight) as (second, engine, _):
        second.client.send(Connect())
        hello = await second.client.receive()
        assert isinstance(hello, Hello)
        client.engine_ready(second.client, hello)
        results = await asyncio.gather(*tasks)
        await client.close()
    assert results == [expected(request) for request in requests]
    assert not engine.has_work()
    engine.check_integrity()


async def test_random_disconnects_and_deadlines_leave_nothing_behind() -> None:
    rng = random.Random(1)
    with engine_thread(2) as (transport, engine, _):
        async with client_for(transport) as client:

            async def one(number: int) -> None:
                request = make_request(number)
                leave_after = rng.randrange(8)
                received = 0
                stream = client.generate(request)
                async for delta in stream:
                    received += len(delta.token_ids)
                    if number % 2 and received > leave_after:
                        await stream.aclose()  # type: ignore[attr-defined]
                        return
                assert received == request.sampling.max_tokens

            await asyncio.gather(*(one(number) for number in range(150)))
            late = GenerationRequest(
                request_id="late",
                prompt=TokensPrompt([1]),
                sampling=SamplingParams(max_tokens=200, ignore_eos=True),
                timeout_s=0.001,
            )
            with pytest.raises(DeadlineExceededError):
                await outputs(client, late)
            async with asyncio.timeout(5):
                while engine.has_work():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    engine.check_integrity()
