"""Log lines: one per event, request id in each, nothing that a client sends can begin a new one."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from penstock.core.log import configure_logging, one_line, request_id_scope


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("penstock").setLevel(logging.NOTSET)


def test_text_line_has_time_level_logger_and_request_id(stream: io.StringIO) -> None:
    configure_logging("info", "text", stream)
    with request_id_scope("abc"):
        logging.getLogger("penstock.x").info("hello %d", 3)
    logging.getLogger("penstock.x").info("outside")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("Z INFO penstock.x [abc] hello 3")
    assert second.endswith("Z INFO penstock.x outside")


def test_a_message_stays_on_its_line(stream: io.StringIO) -> None:
    configure_logging("info", "text", stream)
    logging.getLogger("penstock.x").info("a\n2026 ERROR forged\r\u2028\x1b[31m")
    assert len(stream.getvalue().splitlines()) == 1
    assert "a\\n2026 ERROR forged\\r\\u2028\\u001b[31m" in stream.getvalue()


def test_tracebacks_are_indented(stream: io.StringIO) -> None:
    configure_logging("info", "text", stream)
    try:
        raise ValueError("first\nERROR forged")
    except ValueError:
        logging.getLogger("penstock.x").exception("failed")
    head, *rest = stream.getvalue().splitlines()
    assert head.endswith("failed")
    assert rest
    assert all(line.startswith("    ") for line in rest)


def test_json_lines_are_objects(stream: io.StringIO) -> None:
    configure_logging("debug", "json", stream)
    with request_id_scope("abc"):
        logging.getLogger("penstock.x").debug("a\nb", extra={"fields": {"status": 200, "message": "not this"}})
    entry = json.loads(stream.getvalue())
    assert stream.getvalue().count("\n") == 1
    assert entry["message"] == "a\nb"
    assert (entry["level"], entry["logger"], entry["request_id"], entry["status"]) == (
        "debug",
        "penstock.x",
        "abc",
        200,
    )


def test_json_lines_carry_the_traceback(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    try:
        raise ValueError("inside")
    except ValueError:
        logging.getLogger("penstock.x").exception("failed")
    assert "ValueError: inside" in json.loads(stream.getvalue())["exception"]


@pytest.mark.parametrize(("level", "shown"), [("debug", 3), ("info", 2), ("error", 1)])
def test_level_is_that_of_our_own_lines(stream: io.StringIO, level: str, shown: int) -> None:
    configure_logging(level, "text", stream)
    logger = logging.getLogger("penstock.x")
    logger.debug("1")
    logger.info("2")
    logger.error("3")
    logging.getLogger("somebody.else").info("never")
    assert len(stream.getvalue().splitlines()) == shown


def test_the_http_servers_lines_come_the_same_way_once(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    configure_logging("info", "json", stream)
    logging.getLogger("uvicorn.error").error("from uvicorn")
    assert [json.loads(line)["logger"] for line in stream.getvalue().splitlines()] == ["uvicorn.error"]


def test_lone_surrogates_are_written_as_escapes() -> None:
    assert one_line("a\ud800b").encode() == b"a\\ud800b"
