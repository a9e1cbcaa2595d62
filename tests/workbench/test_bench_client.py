"""The client against a real server on a socket: exact counts, merged events, every way to fail, reused connections."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from penstock.core.errors import ConfigError
from penstock.workbench.bench.arrival import ClosedLoop, OpenLoop
from penstock.workbench.bench.client import Client, Target
from penstock.workbench.bench.http import Response
from penstock.workbench.bench.load import BenchmarkError, run_load
from penstock.workbench.bench.record import RequestRecord, read_events
from penstock.workbench.bench.workload import BenchRequest, Lengths, Workload
from tests.workbench.fake_openai import Failure, FakeOpenAI

REQUEST = BenchRequest(index=3, prompt=[300, 301, 302], prompt_tokens=3, max_tokens=6)
WORKLOAD = Workload(input_lengths=Lengths(5, 5), output_lengths=Lengths(4, 4), seed=1)


async def ask(server: FakeOpenAI, request: BenchRequest = REQUEST, **target: Any) -> RequestRecord:
    async with Client(Target(url=server.url, model="m", **target)) as client:
        return await client.send(request, 0.0)


async def test_a_stream_is_counted_token_by_token() -> None:
    with FakeOpenAI(cached=2) as server:
        record = await ask(server)
    assert record.error is None
    assert [count for _, count in record.arrivals] == [1] * 6
    times = [at for at, _ in record.arrivals]
    assert record.sent < times[0]
    assert times == sorted(times)
    assert times[-1] <= record.finished
    assert (record.index, record.due, record.prompt_tokens, record.cached_tokens) == (3, 0.0, 3, 2)
    assert (record.output_tokens, record.asked_tokens, record.finish_reason) == (6, 6, "length")
    assert (record.counted_by, record.exact) == ("usage", True)


async def test_merged_events_count_by_running_usage() -> None:
    with FakeOpenAI(tokens_per_event=(1, 3, 2), text="") as server:
        record = await ask(server)
    assert [count for _, count in record.arrivals] == [1, 3, 2]
    assert (record.output_tokens, record.exact) == (6, True)


async def test_without_running_usage_merged_events_are_marked() -> None:
    with FakeOpenAI(tokens_per_event=(2,), usage="final") as server:
        record = await ask(server)
    assert [count for _, count in record.arrivals] == [1, 1, 1]
    assert (record.output_tokens, record.counted_by, record.exact) == (6, "events", False)


async def test_without_any_usage_events_are_counted() -> None:
    with FakeOpenAI(usage="none") as server:
        record = await ask(server)
    assert (record.output_tokens, record.counted_by, record.exact, record.cached_tokens) == (6, "events", False, None)


async def test_what_is_sent() -> None:
    with FakeOpenAI() as server:
        await ask(server, api_key="secret", extra_body={"top_p": 0.5})
        text = BenchRequest(index=0, prompt="hello", prompt_tokens=None, max_tokens=2)
        await ask(server, text, endpoint="chat", extensions=False)
    assert server.seen[0] == {
        "model": "m",
        "prompt": [300, 301, 302],
        "max_tokens": 6,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
        "min_tokens": 6,
        "top_p": 0.5,
    }
    assert "POST /v1/completions HTTP/1.1" in server.heads[0]
    assert "Authorization: Bearer secret" in server.heads[0]
    assert server.seen[1] == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 2,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "POST /v1/chat/completions HTTP/1.1" in server.heads[1]
    assert "Authorization" not in server.heads[1]


@pytest.mark.parametrize(
    ("failure", "kind", "detail", "tokens"),
    [
        ("status", "http_503", "no room", 0),
        ("stream_error", "stream_error", "engine_dead", 6),
        ("cut", "disconnected", "mid-response", 3),
        ("not_http", "bad_response", "Not an HTTP", 0),
        ("no_done", "disconnected", "[DONE]", 6),
    ],
)
async def test_failures_by_kind(failure: Failure, kind: str, detail: str, tokens: int) -> None:
    with FakeOpenAI(failing=lambda number: failure) as server:
        record = await ask(server)
    assert (record.error, record.output_tokens) == (kind, tokens)
    assert detail in record.detail


async def test_a_stream_without_tokens_is_a_failure() -> None:
    with FakeOpenAI(text="", usage="none") as server:
        assert (await ask(server)).error == "no_tokens"


async def test_a_caller_can_watch_a_stream_and_leave_it() -> None:
    response = Response()
    with FakeOpenAI(gap_s=0.005) as server:
        async with Client(Target(url=server.url, model="m")) as client:
            endless = BenchRequest(index=0, prompt=[300], prompt_tokens=1, max_tokens=10_000)
            stream = asyncio.create_task(client.send(endless, 0.0, response=response))
            while len(response.events) < 3:  # noqa: ASYNC110 - the response has no event to wait for
                await asyncio.sleep(0.001)
            stream.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stream
    seen = read_events(response)
    assert [count for _, count in seen.arrivals] == [1] * len(response.events)
    assert seen.total == len(response.events) < 10_000


async def test_a_silent_server_times_out() -> None:
    with FakeOpenAI(failing=lambda number: "silent") as server:
        record = await ask(server, timeout_s=0.05)
    assert record.error == "timeout"


async def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = Target(url=f"http://127.0.0.1:{unused.getsockname()[1]}", model="m")
        async with Client(target) as client:
            record = await client.send(REQUEST, 0.0)
            with pytest.raises(ConfigError, match="cannot be asked"):
                await client.models()
    assert record.error == "connect"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://h:99999"])
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Target(url=url, model="m")


async def test_model_names_with_and_without_v1_in_the_url() -> None:
    with FakeOpenAI() as server:
        for url in (server.url, server.url + "/v1", server.url + "/v1/"):
            async with Client(Target(url=url, model="")) as client:
                assert await client.models() == ["fake-model"]


async def test_connections_are_reused() -> None:
    with FakeOpenAI() as server:
        run = await run_load(Target(url=server.url, model="m"), WORKLOAD, ClosedLoop(1), 5)
        assert [record.error for record in run.records] == [None] * 5
        assert server.connections == 1


async def test_a_server_that_closes_after_each_answer_costs_no_failure() -> None:
    with FakeOpenAI(keep_alive=False) as server:
        run = await run_load(Target(url=server.url, model="m"), WORKLOAD, ClosedLoop(2), 12)
    assert [record.error for record in run.records] == [None] * 12
    assert len(server.seen) == 12


async def test_closed_loop_holds_its_concurrency_at_the_server() -> None:
    with FakeOpenAI(gap_s=0.001) as server:
        run = await run_load(Target(url=server.url, model="m"), WORKLOAD, ClosedLoop(4), 16)
    assert server.most_running == 4
    assert [record.index for record in run.records] == list(range(16))
    assert all(record.output_tokens == 4 for record in run.records)


async def test_open_loop_latency_includes_what_the_generator_was_late() -> None:
    with FakeOpenAI() as server:
        run = await run_load(Target(url=server.url, model="m"), WORKLOAD, OpenLoop(rate=2000.0, seed=1), 40)
    assert [record.index for record in run.records] == list(range(40))
    assert all(record.due <= record.sent < record.finished for record in run.records)
    dues = [record.due - run.records[0].due for record in run.records]
    assert dues == pytest.approx(OpenLoop(rate=2000.0, seed=1).times(40))


async def test_one_failure_among_many_stays_alone() -> None:
    with FakeOpenAI(failing=lambda number: "cut" if number == 2 else "") as server:
        run = await run_load(Target(url=server.url, model="m"), WORKLOAD, ClosedLoop(1), 6)
    assert [record.error for record in run.records] == [None, None, "disconnected", None, None, None]


async def test_warm_up_is_not_measured_but_shares_the_prefix() -> None:
    shared = Workload(input_lengths=Lengths(10, 10), output_lengths=Lengths(1, 1), seed=1, prefix_share=0.5)
    with FakeOpenAI() as server:
        run = await run_load(Target(url=server.url, model="m"), shared, ClosedLoop(1), 3, warmup=1)
    prompts = [body["prompt"] for body in server.seen]
    assert len(run.records) == 3
    assert len(prompts) == 4
    assert {tuple(prompt[:5]) for prompt in prompts} == {tuple(prompts[0][:5])}
    assert len({tuple(prompt) for prompt in prompts}) == 4


async def test_a_server_that_serves_nothing_is_not_measured() -> None:
    with FakeOpenAI(failing=lambda number: "status") as server, pytest.raises(BenchmarkError, match="http_503"):
        await run_load(Target(url=server.url, model="m"), WORKLOAD, ClosedLoop(1), 3, warmup=1)
