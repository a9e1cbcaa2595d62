"""The HTTP reader: any framing, cut at any byte, gives the same events; what is not HTTP is refused."""

from __future__ import annotations

import pytest

from penstock.workbench.bench.http import (
    MAX_HEAD_BYTES,
    ConnectionClosedError,
    EventSplitter,
    HttpProtocolError,
    Response,
)

EVENTS = b'data: {"a":1}\n\n: ping\n\ndata:two\r\n\r\nevent: x\ndata: three\ndata: lines\n\ndata: [DONE]\n\n'
EXPECTED = [b'{"a":1}', b"two", b"three\nlines"]
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"


def chunked(payload: bytes, size: int) -> bytes:
    pieces = [payload[start : start + size] for start in range(0, len(payload), size)]
    return (
        b"".join(f"{len(piece):X};ext=1\r\n".encode() + piece + b"\r\n" for piece in pieces)
        + b"0\r\nTrailer: x\r\n\r\n"
    )


def fed(raw: bytes, step: int) -> Response:
    response = Response()
    for number, start in enumerate(range(0, len(raw), step)):
        response.feed(raw[start : start + step], float(number))
    return response


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("chunk", [1, 5, 10_000])
def test_chunked_stream_cut_anywhere(step: int, chunk: int) -> None:
    response = fed(STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(EVENTS, chunk), step)
    assert [data for _, data in response.events] == EXPECTED
    assert response.done
    assert response.complete
    assert response.keep_alive
    times = [at for at, _ in response.events]
    assert times == sorted(times)


@pytest.mark.parametrize("step", [1, 4, 10_000])
def test_content_length_and_interim_response(step: int) -> None:
    raw = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
    response = fed(raw, step)
    assert (response.status, response.body, response.complete, response.keep_alive) == (404, b"hello", True, False)


def test_stream_that_ends_with_the_connection() -> None:
    response = fed(STREAM_HEAD + b"\r\n" + EVENTS, 9)
    assert not response.complete
    response.feed_eof()
    assert response.complete
    assert not response.keep_alive
    assert [data for _, data in response.events] == EXPECTED


def test_close_before_the_end_is_an_error_that_says_whether_anything_came() -> None:
    with pytest.raises(ConnectionClosedError) as nothing:
        Response().feed_eof()
    assert not nothing.value.started
    with pytest.raises(ConnectionClosedError) as half:
        fed(STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", 100).feed_eof()
    assert half.value.started


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 2000,
        b"H" * (MAX_HEAD_BYTES + 1),
    ],
)
def test_what_is_not_http_is_refused(raw: bytes) -> None:
    with pytest.raises(HttpProtocolError):
        Response().feed(raw, 0.0)


def test_events_in_one_block_share_its_time() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\n\ndata: b\n\ndata: c") == [b"a", b"b"]
    assert splitter.feed(b"\n\n") == [b"c"]
