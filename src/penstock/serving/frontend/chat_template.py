"""Chat templates: code from a model's folder, so it runs in a process of its own with bounded time, memory and output.

Jinja's sandbox keeps a template away from Python's internals, but not from endless loops or `'x' * 10**10`. The child process
(`template_worker`) has a limit on its memory and is killed by its own timer; the server only ever waits for a bounded time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from penstock.core.errors import InvalidRequestError, ModelFormatError

logger = logging.getLogger(__name__)

RENDER_TIMEOUT_S = 2.0
# Starting Python and importing Jinja on a busy machine.
START_TIMEOUT_S = 30.0
MAX_OUTPUT_CHARS = 16 * 2**20
MEMORY_LIMIT_BYTES = 768 * 2**20
HEADER_BYTES = 4


class TemplateSetup(msgspec.Struct, frozen=True):
    """First message to the worker."""

    template: str
    timeout_s: float
    max_output_chars: int
    memory_limit_bytes: int


class RenderJob(msgspec.Struct, frozen=True):
    """One rendering: the variables that the template sees."""

    variables: dict[str, Any]


class RenderResult(msgspec.Struct, frozen=True):
    """`kind`: "text" is the result; "ready" answers the setup; "rejected" is the template's own raise_exception or a failure on these
    messages; "broken" means that the template does not compile. `text` is the result or the reason."""

    kind: Literal["text", "ready", "rejected", "broken"]
    text: str


class ChatTemplate:
    """One compiled template in its sandbox process, which starts at the first use and again after it had to be killed.

    `special_tokens` are variables of the template (bos_token, eos_token, …). Thread-safe; one rendering at a time.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        timeout_s: float = RENDER_TIMEOUT_S,
        max_output_chars: int = MAX_OUTPUT_CHARS,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._setup = TemplateSetup(source, timeout_s, max_output_chars, memory_limit_bytes)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Compile the template. Raises ModelFormatError when it does not compile."""
        with self._lock:
            self._running_process()

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text. Raises InvalidRequestError (param messages) when the template refuses the messages or takes too long or
        too much for them, ModelFormatError when the template itself is broken."""
        job = RenderJob(
            {
                **self._special_tokens,
                "messages": list(messages),
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
            }
        )
        try:
            payload = msgspec.msgpack.encode(job)
        except (TypeError, UnicodeEncodeError, OverflowError, RecursionError) as error:
            raise InvalidRequestError("The messages are not plain JSON data.", param="messages") from error
        with self._lock:
            process = self._running_process()
            result = self._exchange(process, payload, self._setup.timeout_s + 1.0)
            if result is None:
                self._kill()
                logger.warning("the chat template was stopped: too much time or memory")
                raise InvalidRequestError(
                    "The chat template needs too much time or memory for these messages.", param="messages"
                )
        if result.kind == "text":
            return result.text
        raise InvalidRequestError(f"The chat template refuses these messages: {result.text}", param="messages")

    def close(self) -> None:
        """Stop the process. Idempotent."""
        with self._lock:
            self._kill()

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "penstock.serving.frontend.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        result = self._exchange(self._process, msgspec.msgpack.encode(self._setup), START_TIMEOUT_S)
        if result is not None and result.kind == "ready":
            return self._process
        self._kill()
        reason = result.text if result is not None else "it needs too much time or memory"
        raise ModelFormatError(f"The chat template does not compile: {reason}")

    def _exchange(self, process: subprocess.Popen[bytes], payload: bytes, timeout_s: float) -> RenderResult | None:
        """Send one message and read the answer; None when the process ends or does not answer in time."""
        assert process.stdin is not None  # noqa: S101  opened above
        assert process.stdout is not None  # noqa: S101
        deadline = time.monotonic() + timeout_s
        try:
            write_all(process.stdin.fileno(), len(payload).to_bytes(HEADER_BYTES, "big") + payload, deadline)
            size = int.from_bytes(read_exactly(process.stdout.fileno(), HEADER_BYTES, deadline), "big")
            answer = read_exactly(process.stdout.fileno(), size, deadline)
        except (OSError, EOFError, TimeoutError):
            return None
        return msgspec.msgpack.decode(answer, type=RenderResult)

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __del__(self) -> None:
        self._kill()


def wait_for(descriptor: int, event: int, deadline: float) -> None:
    """Wait until `event` (select.POLLIN or POLLOUT). Raises TimeoutError at `deadline`. Not select(), which ends at descriptor 1023."""
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def write_all(descriptor: int, data: bytes, deadline: float) -> None:
    """Write everything. Raises TimeoutError at `deadline` (monotonic seconds), OSError when the reader is gone."""
    view = memoryview(data)
    while view:
        # A pipe that is ready takes at least PIPE_BUF bytes without blocking.
        wait_for(descriptor, select.POLLOUT, deadline)
        view = view[os.write(descriptor, view[: select.PIPE_BUF]) :]


def read_exactly(descriptor: int, size: int, deadline: float) -> bytes:
    """Read `size` bytes. Raises TimeoutError at `deadline` (monotonic seconds), EOFError when the writer is gone."""
    parts = []
    while size:
        wait_for(descriptor, select.POLLIN, deadline)
        part = os.read(descriptor, min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
