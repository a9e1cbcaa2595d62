import socket
import threading
from collections.abc import Iterator

import pytest

from penstock.core.framing import FrameError, FrameSocket, frame

Pair = tuple[FrameSocket, FrameSocket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = (FrameSocket(sock, 1 << 20) for sock in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_arrive_whole_and_in_order(pair: Pair) -> None:
    ours, theirs = pair
    messages = [b"", b"a", bytes(range(256)) * 1000, b"last"]

    def send() -> None:
        for message in messages:
            ours.send(message)

    sender = threading.Thread(target=send)
    sender.start()
    assert [theirs.receive() for _ in messages] == messages
    sender.join()
    assert not theirs.wait(0)
    ours.close()
    assert theirs.wait(1)
    assert theirs.receive() is None


def test_what_has_arrived_is_given_at_once_and_the_rest_later(pair: Pair) -> None:
    ours, theirs = pair
    whole = frame(b"one", 100) + frame(b"two", 100) + frame(b"three", 100)
    ours.socket.sendall(whole[:-2])
    assert theirs.arrived() == [b"one", b"two"]
    assert theirs.wait(0), "a part of a message is there"
    ours.socket.sendall(whole[-2:])
    assert theirs.arrived() == [b"three"]
    ours.close()
    assert theirs.arrived() is None


def test_a_stream_that_ends_inside_a_message_is_an_error(pair: Pair) -> None:
    ours, theirs = pair
    ours.socket.sendall(frame(b"three", 100)[:-2])
    ours.close()
    with pytest.raises(FrameError, match="inside a frame"):
        theirs.receive()


def test_lengths_are_bounded_both_ways() -> None:
    sockets = socket.socketpair()
    ours, theirs = FrameSocket(sockets[0], 1000), FrameSocket(sockets[1], 10)
    with pytest.raises(FrameError, match="1001 bytes is above the limit of 1000"):
        ours.send(bytes(1001))
    ours.send(bytes(11))
    with pytest.raises(FrameError, match="11 bytes is above the limit of 10"):
        theirs.receive()
    ours.close()
    theirs.close()
