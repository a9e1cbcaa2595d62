"""`penstock serve --gateway-workers 2` with the embedded model: both workers serve, and what dies takes only its own with it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from penstock.testing.server import RunningServer, free_port

TOKENS = 1200
LIMIT_9 = 'penstock_engine_limit{model="stories",name="max_num_seqs"} 9.0'
FLAGS = ("--kv-cache-gib", "0.1", "--threads", "1", "--gateway-workers", "2")


def start(folder: Path, *flags: str) -> RunningServer:
    return RunningServer("stories", *FLAGS, *flags, log=folder / "log")


@pytest.fixture
def workers_server(tmp_path: Path) -> Iterator[RunningServer]:
    with start(tmp_path) as server:
        until(lambda: len(worker_pids(server)) == 2 and server.metric("penstock_gateway_workers") == 2)
        yield server


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def pids_of(server: RunningServer, kind: str) -> list[int]:
    found = []
    for child in psutil.Process(server.process.pid).children():
        try:
            command = child.cmdline()
        except psutil.Error:
            continue
        if "penstock.launch_worker" in command and kind in command:
            found.append(child.pid)
    return found


def worker_pids(server: RunningServer) -> list[int]:
    return pids_of(server, "worker")


def body(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "stories", "prompt": prompt, "max_tokens": 4, "ignore_eos": True, "temperature": 0, **more}


def complete(server: RunningServer, prompt: str) -> httpx.Response:
    return httpx.post(server.url + "/v1/completions", json=body(prompt), timeout=30)


def worker_of(server: RunningServer, response: httpx.Response) -> int:
    """The worker that holds the other end of a response's connection."""
    port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
    for pid in worker_pids(server):
        if any(c.raddr and c.raddr.port == port for c in psutil.Process(pid).net_connections("tcp")):
            return pid
    raise AssertionError(f"no worker holds the connection from port {port}")


class Stream:
    """One streamed completion and the worker that serves it."""

    def __init__(self, server: RunningServer, response: httpx.Response) -> None:
        self.pid = worker_of(server, response)
        self.events: list[str] = []
        self._response = response

    async def read(self) -> str:
        """Read to the end. How it ended: "done", "error" (an error event) or "broken" (no end)."""
        try:
            async for line in self._response.aiter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
        except httpx.HTTPError:
            return "broken"
        if self.events[-1:] == ["[DONE]"]:
            return "done"
        return "error" if "error" in json.loads(self.events[-1]) else "broken"

    @property
    def tokens(self) -> int:
        usages = [json.loads(event).get("usage") for event in self.events if event != "[DONE]"]
        return max((usage["completion_tokens"] for usage in usages if usage), default=0)


@asynccontextmanager
async def streams_on_both(server: RunningServer, tokens: int = TOKENS) -> AsyncIterator[list[Stream]]:
    """Streams that have begun, on each worker at least two."""
    async with httpx.AsyncClient(timeout=90, limits=httpx.Limits(max_connections=None)) as client:
        streams: list[Stream] = []
        try:
            while len(streams) < 40 and not enough(server, streams):
                request = client.build_request(
                    "POST",
                    server.url + "/v1/completions",
                    json=body(
                        f"Story {len(streams)}:",
                        max_tokens=tokens,
                        stream=True,
                        stream_options={"include_usage": True, "continuous_usage_stats": True},
                    ),
                    headers={"cache-control": "no-store"},
                )
                streams.append(Stream(server, await client.send(request, stream=True)))
            assert enough(server, streams), "one worker got all the connections"
            yield streams
        finally:
            for stream in streams:
                await stream._response.aclose()


def enough(server: RunningServer, streams: list[Stream]) -> bool:
    return all(sum(stream.pid == pid for stream in streams) >= 2 for pid in worker_pids(server))


async def test_both_serve_share_the_cache_and_add_up_their_metrics(workers_server: RunningServer) -> None:
    server = workers_server
    seen: set[tuple[int, str]] = set()
    count = 0
    async with asyncio.timeout(60):
        while len({pid for pid, _ in seen}) < 2:
            async with httpx.AsyncClient(timeout=30) as client:
                request = client.build_request("POST", server.url + "/v1/completions", json=body("The same prompt"))
                response = await client.send(request, stream=True)
                pid = worker_of(server, response)
                assert response.status_code == 200, await response.aread()
                seen.add((pid, response.headers["x-penstock-cache"]))
                await response.aread()
                count += 1
                await asyncio.sleep(0.1)  # the answer reaches the shared cache behind the response
    assert [outcome for _, outcome in sorted(seen, key=lambda one: one[1])].count("miss") == 1
    assert server.metric("penstock_requests_total", outcome="completed") == count
    assert server.metric("penstock_response_cache_total", outcome="hit") == count - 1
    assert server.metric("penstock_response_cache_entries") == 1
    assert server.metric("penstock_store_up", store="coordinator") == 1
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 4, "engine, coordinator, two workers"
    assert server.interrupt() == 0
    assert "Traceback" not in server.log.read_text()
    assert [child for child in children if child.is_running()] == []


@pytest.mark.slow
async def test_a_killed_worker_is_replaced_and_the_streams_of_the_other_go_on(workers_server: RunningServer) -> None:
    server = workers_server
    async with streams_on_both(server) as streams:
        before = server.metric("penstock_http_requests_total")
        victim = streams[0].pid
        os.kill(victim, signal.SIGKILL)
        outcomes = await asyncio.gather(*(stream.read() for stream in streams))
    for stream, outcome in zip(streams, outcomes, strict=True):
        assert outcome == ("broken" if stream.pid == victim else "done")
    assert all(stream.tokens == TOKENS for stream in streams if stream.pid != victim)
    until(lambda: server.metric("penstock_gateway_workers") == 2)
    assert victim not in worker_pids(server)
    assert server.metric("penstock_gateway_worker_restarts_total") == 1
    assert server.metric("penstock_http_requests_total") >= before
    until(lambda: server.metric("penstock_engine_requests_running") == 0)  # the dead worker's requests too
    assert (await asyncio.to_thread(complete, server, "again")).status_code == 200
    assert server.interrupt() == 0


@pytest.mark.slow
async def test_both_workers_survive_the_engine(workers_server: RunningServer) -> None:
    server = workers_server
    for limit in (7, 9):  # on whichever worker; the last one holds
        changed = await asyncio.to_thread(
            httpx.patch, server.url + "/v1/engine/limits", json={"model": "stories", "max_num_seqs": limit}
        )
        assert changed.status_code == 200, changed.text
    until(lambda: LIMIT_9 in server.get("/metrics")[1])
    async with streams_on_both(server) as streams:
        server.signal_engine(signal.SIGKILL)
        outcomes = await asyncio.gather(*(stream.read() for stream in streams))
    assert set(outcomes) == {"done"}
    assert {stream.tokens for stream in streams} == {TOKENS}
    restarts = {server.metric("penstock_engine_restarts_total") for _ in range(6)}
    assert restarts == {1.0}
    until(lambda: LIMIT_9 in server.get("/metrics")[1])
    assert server.interrupt() == 0


@pytest.mark.slow
async def test_an_engine_that_hangs_is_replaced_for_both(tmp_path: Path) -> None:
    with start(tmp_path, "--hang-timeout-s", "4") as server:
        until(lambda: server.metric("penstock_gateway_workers") == 2)
        async with streams_on_both(server) as streams:
            server.signal_engine(signal.SIGSTOP)
            outcomes = await asyncio.gather(*(stream.read() for stream in streams))
        assert set(outcomes) == {"done"}
        assert {stream.tokens for stream in streams} == {TOKENS}
        assert server.metric("penstock_engine_restarts_total") == 1
        assert server.interrupt() == 0
    assert server.log.read_text().count("killing the engine") == 1


@pytest.mark.slow
def test_an_engine_that_is_gone_for_good_ends_the_server_with_1(tmp_path: Path) -> None:
    with start(tmp_path, "--max-restarts", "0") as server:
        server.signal_engine(signal.SIGKILL)
        assert server.process.wait(60) == 1
    assert "gone for good" in server.log.read_text()


@pytest.mark.parametrize("flags", [("--kv-cache-gib", "0.00001"), ("--port", "taken")])
def test_what_cannot_start_says_why_in_one_line(flags: tuple[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        value = str(taken.getsockname()[1]) if flags[1] == "taken" else flags[1]
        port = () if flags[0] == "--port" else ("--port", "0")
        command = [sys.executable, "-m", "penstock.cli.main", "serve", "stories", "--gateway-workers", "2", *port]
        result = subprocess.run([*command, flags[0], value], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert flags[0] in result.stderr.splitlines()[-1]


def test_nothing_outlives_the_parent(workers_server: RunningServer) -> None:
    server = workers_server
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 4
    server.process.kill()
    assert psutil.wait_procs(children, timeout=20)[1] == []


@pytest.mark.slow
async def test_a_drain_lets_the_streams_of_both_finish(tmp_path: Path) -> None:
    with start(tmp_path, "--drain-linger-s", "2") as server:
        until(lambda: server.metric("penstock_gateway_workers") == 2)
        async with streams_on_both(server) as streams:
            reading = asyncio.gather(*(stream.read() for stream in streams))
            server.process.send_signal(signal.SIGTERM)
            async with httpx.AsyncClient(timeout=30) as client:
                async with asyncio.timeout(20):
                    while (await client.get(server.url + "/health/ready")).status_code != 503:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                lingering = await client.post(server.url + "/v1/completions", json=body("still accepted"))
            assert lingering.status_code == 200
            assert set(await reading) == {"done"}
        assert await asyncio.to_thread(server.process.wait, 40) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
async def test_what_does_not_finish_in_time_gets_an_error_event(tmp_path: Path) -> None:
    with start(tmp_path, "--drain-timeout-s", "0.3", "--metrics-port", str(port := free_port())) as server:
        until(lambda: server.metric("penstock_gateway_workers") == 2)
        page = await asyncio.to_thread(httpx.get, f"http://127.0.0.1:{port}/metrics")
        assert "penstock_gateway_workers 2.0" in page.text
        async with streams_on_both(server, tokens=2000) as streams:
            server.process.send_signal(signal.SIGINT)
            outcomes = await asyncio.gather(*(stream.read() for stream in streams))
            assert await asyncio.to_thread(server.process.wait, 40) == 0
    assert "error" in outcomes
    assert "broken" not in outcomes


def test_a_dead_coordinator_is_replaced_and_no_request_fails_for_it(workers_server: RunningServer) -> None:
    server = workers_server
    (coordinator,) = pids_of(server, "coordinator")
    os.kill(coordinator, signal.SIGKILL)
    until(lambda: pids_of(server, "coordinator") not in ([], [coordinator]))
    for number in range(10):
        answer = complete(server, f"Prompt {number}")
        assert answer.status_code == 200, answer.text
    until(lambda: server.metric("penstock_store_up", store="coordinator") == 1)
    assert server.interrupt() == 0
    text = server.log.read_text()
    assert text.count("the coordinator is away") == 2, "one line for each worker"
    assert text.count("the coordinator is back") == 2
