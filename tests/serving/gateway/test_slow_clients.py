"""What one connection may cost: clients that send or read slowly, without end, or too many at once. Raw sockets, a tiny application."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from penstock.serving.gateway.http_protocol import MAX_HEAD_BYTES, BoundedHttpProtocol, HttpLimits

HEAD = b"POST /echo HTTP/1.1\r\nhost: a\r\n"
LARGE = 16 * 2**20


class App:
    """/echo answers with the length of the body, /slow after `go` was set, /large with 16 MiB, /endless with bytes for ever.

    `outcomes`: how each request ended for the application."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.outcomes.append("disconnected")
                return
            size += len(message["body"])
            if not message["more_body"]:
                break
        if scope["path"] == "/slow":
            await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/endless":
            watching = asyncio.ensure_future(receive())
            while not watching.done():
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)
            self.outcomes.append("disconnected")
        body = b"x" * LARGE if scope["path"] == "/large" else str(size).encode()
        await send({"type": "http.response.body", "body": body, "more_body": False})
        self.outcomes.append("answered")


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Running:
    def __init__(self, app: App, server: Server, port: int) -> None:
        self.app = app
        self.server = server
        self.port = port
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self, receive_buffer: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock)
        self.writers.append(writer)
        return reader, writer

    async def ask(self, data: bytes) -> bytes:
        """Everything that comes back until the server closes."""
        reader, writer = await self.connect()
        writer.write(data)
        return await everything(reader)

    async def until_no_connection(self) -> None:
        while self.server.server_state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def everything(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.read(), 30)


@asynccontextmanager
async def running(**limits: float) -> AsyncIterator[Running]:
    app = App()
    bounds = HttpLimits(**{"read_timeout_s": 20.0, "write_timeout_s": 20.0, **limits})  # type: ignore[arg-type]
    config = uvicorn.Config(
        app,
        http=functools.partial(BoundedHttpProtocol, limits=bounds),  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        here = Running(app, server, listener.getsockname()[1])
        try:
            yield here
        finally:
            for writer in here.writers:
                writer.transport.abort()
            server.should_exit = True
            await asyncio.wait_for(task, 30)


def error(answer: bytes) -> tuple[int, str]:
    """Status and code of a refusal; checks that it is one error object and the last thing on the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert b"content-type: application/json" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def test_an_ordinary_request_is_not_in_the_way() -> None:
    async with running() as server:
        answer = await server.ask(HEAD + b"connection: close\r\ncontent-length: 3\r\n\r\nabc")
        assert answer.endswith(b"1\r\n3\r\n0\r\n\r\n")
        await server.until_no_connection()


@pytest.mark.parametrize("sent", [b"P", HEAD, HEAD + b"x-a: b"])
async def test_a_head_that_does_not_end_is_408(sent: bytes) -> None:
    async with running(read_timeout_s=0.2) as server:
        assert error(await server.ask(sent)) == (408, "request_timeout")
        assert server.app.outcomes == []


async def test_a_head_that_drips_is_408_all_the_same() -> None:
    async with running(read_timeout_s=0.5) as server:
        reader, writer = await server.connect()

        async def drip() -> None:
            with contextlib.suppress(OSError):
                for byte in HEAD * 20:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert error(await everything(reader)) == (408, "request_timeout")
        dripping.cancel()


async def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    async with running(read_timeout_s=0.2) as server:
        assert await server.ask(b"") == b""


@pytest.mark.parametrize("body", [b"content-length: 10\r\n\r\nabc", b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"])
async def test_a_body_that_does_not_end_is_408(body: bytes) -> None:
    async with running(read_timeout_s=0.2) as server:
        assert error(await server.ask(HEAD + body)) == (408, "request_timeout")
        await server.until_no_connection()
        assert server.app.outcomes == ["disconnected"]


async def test_the_second_request_of_a_connection_has_its_own_time() -> None:
    async with running(read_timeout_s=1.0) as server:
        reader, writer = await server.connect()
        for _ in range(2):
            writer.write(HEAD + b"content-length: 0\r\n\r\n")
            assert (await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.7)
        writer.write(b"POST")
        assert error(await everything(reader)) == (408, "request_timeout")


async def test_empty_lines_do_not_keep_a_connection_open() -> None:
    async with running(read_timeout_s=0.3) as server:
        reader, writer = await server.connect()
        writer.write(HEAD + b"content-length: 0\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
        writer.write(b"\r\n")
        assert await everything(reader) == b""


async def test_half_a_pipelined_request_does_not_break_the_answer_before_it() -> None:
    async with running(read_timeout_s=0.2) as server:
        reader, writer = await server.connect()
        writer.write(b"POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nab" + b"GET /ne")
        await asyncio.sleep(0.6)
        server.app.go.set()
        answer = await everything(reader)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"1\r\n2\r\n0\r\n\r\n")
        assert b"408" not in answer


@pytest.mark.parametrize(
    "start",
    [
        b"GET /" + b"a" * (16 * MAX_HEAD_BYTES),
        HEAD + b"x-a: " + b"a" * (16 * MAX_HEAD_BYTES),
        HEAD + b"x: y\r\n" * MAX_HEAD_BYTES,
        HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-trailer: " + b"a" * (16 * MAX_HEAD_BYTES),
        HEAD + b"transfer-encoding: chunked\r\n\r\n3;" + b"a" * (16 * MAX_HEAD_BYTES),
    ],
    ids=["path", "header", "headers", "trailer", "chunk extension"],
)
async def test_what_is_not_body_is_bounded(start: bytes) -> None:
    async with running() as server:
        status, code = error(await server.ask(start))
        assert (status, code) in {(431, "invalid_http"), (400, "invalid_http")}
        await server.until_no_connection()


async def test_connections_are_bounded_and_the_others_go_on() -> None:
    async with running(max_connections=3) as server:
        kept = [await server.connect() for _ in range(3)]
        for reader, writer in kept:
            writer.write(HEAD + b"content-length: 0\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
        refused = await server.ask(HEAD + b"content-length: 0\r\n\r\n")
        assert error(refused) == (503, "too_many_connections")
        assert b"retry-after: 1\r\n" in refused
        assert len(server.app.outcomes) == 3
        kept[0][1].close()
        await kept[0][1].wait_closed()
        while len(server.server.server_state.connections) > 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert b"200" in await server.ask(HEAD + b"connection: close\r\ncontent-length: 0\r\n\r\n")


@pytest.mark.parametrize("path", [b"/large", b"/endless"])
async def test_a_client_that_reads_nothing_is_cut_off(path: bytes) -> None:
    async with running(write_timeout_s=0.3) as server:
        _, writer = await server.connect(receive_buffer=4096)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET " + path + b" HTTP/1.1\r\nhost: a\r\n\r\n")
        async with asyncio.timeout(30):
            while not server.server.server_state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await server.until_no_connection()


async def test_a_client_that_reads_slowly_gets_everything() -> None:
    async with running(write_timeout_s=1.5) as server:
        reader, writer = await server.connect(receive_buffer=65536)
        writer.write(b"GET /large HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        size = 0
        pauses = 5
        while data := await asyncio.wait_for(reader.read(2**20), 30):
            size += len(data)
            if pauses:
                pauses -= 1
                await asyncio.sleep(0.5)
        assert size > LARGE


async def test_bytes_that_are_not_http_are_an_error_object() -> None:
    async with running() as server:
        assert error(await server.ask(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello")) == (400, "invalid_http")
