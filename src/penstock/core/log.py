"""Logging: one line per event, the request's id in every line, text or JSON.

Modules log through `logging.getLogger(__name__)`; this module only decides what a line looks like. A line never contains a raw
control character of a message, so nobody can forge a second line by sending one; the lines of a traceback are indented.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TextIO

# Id of the HTTP request that the current task works for; empty outside of one.
request_id_var: ContextVar[str] = ContextVar("penstock_request_id", default="")

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FOREIGN_LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "asyncio")


def one_line(text: str) -> str:
    """`text` with every control character, line separator and lone surrogate written as an escape."""
    return _CONTROL.sub(
        lambda match: f"\\u{ord(match[0]):04x}" if match[0] not in "\n\r\t" else repr(match[0])[1:-1], text
    )


def current_request_id() -> str:
    """Id of the request that the current task works for, "" outside of one."""
    return request_id_var.get()


@contextlib.contextmanager
def request_id_scope(request_id: str) -> Iterator[None]:
    """Every line logged inside carries `request_id`."""
    token = request_id_var.set(request_id)
    try:
        yield
    finally:
        request_id_var.reset(token)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO penstock.module [request id] message`, tracebacks indented below."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = request_id_var.get()
        scope = f" [{one_line(request_id)}]" if request_id else ""
        line = f"{_timestamp(record)} {record.levelname} {record.name}{scope} {one_line(record.getMessage())}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line = "\n".join([line, *("    " + one_line(part) for part in trace)])
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and where present request_id, exception and `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := request_id_var.get():
            entry["request_id"] = request_id
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            entry.update({key: value for key, value in fields.items() if key not in entry})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(level: str = "info", log_format: str = "text", stream: TextIO | None = None) -> None:
    """Send every log line of this process, the HTTP server's included, to `stream` (standard error). Can be called again."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    # The level is ours; libraries say only what is wrong.
    root.setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    logging.getLogger("penstock").setLevel(level.upper())
    for name in _FOREIGN_LOGGERS:
        foreign = logging.getLogger(name)
        foreign.handlers.clear()
        foreign.propagate = True
        foreign.setLevel(logging.NOTSET)
    # The HTTP server's own access log would say what ours says, without the request id.
    logging.getLogger("uvicorn.access").propagate = False


def _timestamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
