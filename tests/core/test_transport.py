"""Both transports behave alike, neither end blocks, and what does not decode is dropped."""

from __future__ import annotations

import asyncio
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from penstock.core.errors import OverloadedError
from penstock.core.transport import (
    SEND_QUEUE_LENGTH,
    ClientEndpoint,
    ClientId,
    EngineEndpoint,
    InProcessTransport,
    SocketDirectory,
    ZmqClientEndpoint,
    ZmqEngineEndpoint,
)
from penstock.core.types import (
    Abort,
    Connect,
    Deltas,
    EngineRequest,
    Ping,
    SampleStart,
    SamplingParams,
    StartupFailed,
    Submit,
    TokenDelta,
    TokenLogprobs,
)

Pair = tuple[EngineEndpoint, ClientEndpoint]

REQUEST = EngineRequest(
    request_id="r",
    prompt_token_ids=[1, 2, 3],
    sampling=SamplingParams(seed=5, max_tokens=7, logit_bias={3: -1.0}, stop_token_ids=(4,)),
    samples=[SampleStart(0), SampleStart(1, [9])],
)
DELTA = TokenDelta("r", 1, 0, 4, [5, 6], logprobs=[TokenLogprobs(5, -0.5, 1, [(5, -0.5)])], finish_reason="stop")


@pytest.fixture
def sockets() -> Iterator[SocketDirectory]:
    with SocketDirectory() as directory:
        yield directory


@pytest.fixture(params=["zmq", "in-process"])
def pair(request: pytest.FixtureRequest, sockets: SocketDirectory) -> Iterator[Pair]:
    engine: EngineEndpoint
    client: ClientEndpoint
    if request.param == "zmq":
        address = sockets.new_address()
        engine, client = ZmqEngineEndpoint(address), ZmqClientEndpoint(address)
    else:
        transport = InProcessTransport()
        engine, client = transport.engine, transport.client
    yield engine, client
    client.close()
    engine.close()


async def receive_one(engine: EngineEndpoint) -> tuple[ClientId, object]:
    messages = await asyncio.to_thread(engine.receive, 5.0)
    assert len(messages) == 1
    return messages[0]


async def test_messages_arrive_as_they_were(pair: Pair) -> None:
    engine, client = pair
    client.send(Submit(REQUEST))
    identity, message = await receive_one(engine)
    assert message == Submit(REQUEST)
    assert engine.send(identity, Deltas([DELTA]))
    assert await asyncio.wait_for(client.receive(), 5) == Deltas([DELTA])


async def test_receive_returns_everything_in_order_and_does_not_wait_for_nothing(pair: Pair) -> None:
    engine, client = pair
    assert engine.receive(0) == []
    assert engine.receive(0.01) == []
    sent = [Abort([str(number)]) for number in range(50)]
    for message in sent:
        client.send(message)
    received: list[object] = []
    while len(received) < 50:
        received += [message for _, message in engine.receive(1.0)]
    assert received == sent


async def test_sends_do_not_eat_the_news_of_incoming_messages(pair: Pair) -> None:
    """A reader that waits must wake up although the same socket is sent on all the time."""
    engine, client = pair
    client.send(Connect())
    await receive_one(engine)
    stop = threading.Event()

    def echo() -> None:
        while not stop.is_set():
            for who, message in engine.receive(0.05):
                if isinstance(message, Abort):
                    engine.send(who, StartupFailed(message.request_ids[0]))

    thread = threading.Thread(target=echo)
    thread.start()

    async def read() -> list[str]:
        texts = []
        for _ in range(500):
            message = await client.receive()
            assert isinstance(message, StartupFailed)
            texts.append(message.message)
        return texts

    try:
        reader = asyncio.create_task(read())
        for number in range(500):
            client.send(Abort([str(number)]))
            client.send(Ping())
            if number % 7 == 0:
                await asyncio.sleep(0)
            if number % 50 == 0:
                await asyncio.sleep(0.002)
        assert await asyncio.wait_for(reader, 10) == [str(number) for number in range(500)]
    finally:
        stop.set()
        thread.join()


async def test_a_full_queue_to_the_engine_says_so(pair: Pair) -> None:
    _, client = pair

    def flood() -> None:
        for _ in range(3 * SEND_QUEUE_LENGTH):
            client.send(Ping())

    with pytest.raises(OverloadedError):
        flood()


async def test_a_full_client_is_reported_and_does_not_block(pair: Pair) -> None:
    engine, client = pair
    client.send(Connect())
    identity, _ = await receive_one(engine)
    results = [engine.send(identity, Deltas([])) for _ in range(3 * SEND_QUEUE_LENGTH)]
    assert results[0] is True
    assert results[-1] is False


def test_an_unknown_client_is_reported(sockets: SocketDirectory) -> None:
    engine = ZmqEngineEndpoint(sockets.new_address())
    assert engine.send(b"nobody", Deltas([])) is False
    engine.close()


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xc1 not msgpack"],
        [msgspec.msgpack.encode({"type": "unknown"})],
        [b"two", b"frames"],
        # Decodes, but temperature is out of bounds: the struct's own check refuses it.
        [
            msgspec.msgpack.encode(Submit(REQUEST)).replace(
                msgspec.msgpack.encode("max_tokens") + b"\x07", msgspec.msgpack.encode("max_tokens") + b"\xff"
            )
        ],
    ],
)
async def test_a_bad_message_is_dropped_and_the_next_one_arrives(
    sockets: SocketDirectory, frames: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    address = sockets.new_address()
    engine = ZmqEngineEndpoint(address)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    socket.send_multipart(frames)
    socket.send(msgspec.msgpack.encode(Ping()))
    received: list[object] = []
    while not received:
        received += [message for _, message in engine.receive(1.0)]
    assert received == [Ping()]
    assert "does not decode" in caplog.text
    socket.close()
    context.term()
    engine.close()


async def test_a_client_drops_bad_messages_too(sockets: SocketDirectory) -> None:
    address = sockets.new_address()
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(address)
    client = ZmqClientEndpoint(address)
    client.send(Connect())
    identity, _ = await asyncio.to_thread(socket.recv_multipart)
    socket.send_multipart([identity, b"\xc1"])
    socket.send_multipart([identity, msgspec.msgpack.encode(StartupFailed("no"))])
    assert await asyncio.wait_for(client.receive(), 5) == StartupFailed("no")
    client.close()
    socket.close()
    context.term()


async def test_a_client_may_come_before_the_engine(sockets: SocketDirectory) -> None:
    address = sockets.new_address()
    client = ZmqClientEndpoint(address)
    client.send(Connect())
    await asyncio.sleep(0.05)
    engine = ZmqEngineEndpoint(address)
    _, message = await receive_one(engine)
    assert message == Connect()
    client.close()
    engine.close()


def test_the_socket_directory_is_private_and_removed() -> None:
    directory = SocketDirectory()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    first, second = directory.new_address(), directory.new_address()
    assert first != second
    assert first.startswith(f"ipc://{directory.path}/")
    directory.close()
    directory.close()
    assert not directory.path.exists()


def test_a_long_temporary_path_does_not_break_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_long: Callable[[], str] = lambda: str(tmp_path / ("x" * 120))  # noqa: E731
    monkeypatch.setattr("tempfile.gettempdir", make_long)
    with SocketDirectory() as directory:
        ZmqEngineEndpoint(directory.new_address()).close()
