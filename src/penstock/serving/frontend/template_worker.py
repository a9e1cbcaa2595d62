"""The process in which chat templates run: reads jobs on standard input, writes results on standard output.

Limits are the operating system's, so no template can talk its way around them: an address-space limit, no files written, and a timer
whose signal ends the process even inside a single long operation.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.serving.frontend.chat_template import HEADER_BYTES, RenderJob, RenderResult, TemplateSetup

# Compiling folds constants, so it is bounded by the same timer, but never by less than this.
MIN_COMPILE_TIMEOUT_S = 2.0


class OutputTooLargeError(Exception):
    """The rendered text is above the limit."""


class GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's text for training; for prompts it is just its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    """Lets a template refuse the messages."""
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes, as templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format: str) -> str:
    """The local time."""
    return datetime.now().strftime(format)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def render(template: jinja2.Template, variables: dict[str, Any], max_output_chars: int) -> str:
    """The text. Raises OutputTooLargeError."""
    parts, size = [], 0
    for part in template.generate(variables):
        parts.append(part)
        size += len(part)
        if size > max_output_chars:
            raise OutputTooLargeError(f"the prompt would have more than {max_output_chars} characters")
    return "".join(parts)


def run_job(template: jinja2.Template, job: RenderJob, setup: TemplateSetup) -> RenderResult:
    """Render once; whatever a template can raise becomes a result."""
    try:
        return RenderResult("text", render(template, job.variables, setup.max_output_chars))
    except MemoryError:
        return RenderResult("rejected", "they need too much memory")
    # A template is foreign code: any exception is its answer, none may end the process.
    except Exception as error:
        return RenderResult("rejected", str(error) or type(error).__name__)


def compile_template(setup: TemplateSetup) -> jinja2.Template | RenderResult:
    """The template, or why it is broken."""
    try:
        return make_environment().from_string(setup.template)
    except MemoryError:
        return RenderResult("broken", "it needs too much memory")
    except Exception as error:
        line = getattr(error, "lineno", None)
        return RenderResult("broken", f"{error}" + (f" (line {line})" if line else ""))


def limit_process(memory_limit_bytes: int) -> None:
    """No core dumps, no files, bounded memory."""
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    # macOS has no working limit of the address space; there the timer and the output limit remain.
    if sys.platform != "darwin":
        limits[resource.RLIMIT_AS] = memory_limit_bytes
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next message; None when the parent is gone."""
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    size = int.from_bytes(header, "big")
    payload = stream.read(size)
    return payload if len(payload) == size else None


def write_frame(stream: BinaryIO, result: RenderResult) -> None:
    payload = msgspec.msgpack.encode(result)
    stream.write(len(payload).to_bytes(HEADER_BYTES, "big") + payload)
    stream.flush()


def main() -> None:
    """Serve jobs until standard input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(source)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=TemplateSetup)
    limit_process(setup.memory_limit_bytes)
    signal.setitimer(signal.ITIMER_REAL, max(setup.timeout_s, MIN_COMPILE_TIMEOUT_S))
    template = compile_template(setup)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(template, RenderResult):
        write_frame(sink, template)
        return
    write_frame(sink, RenderResult("ready", ""))
    while (payload := read_frame(source)) is not None:
        job = msgspec.msgpack.decode(payload, type=RenderJob)
        signal.setitimer(signal.ITIMER_REAL, setup.timeout_s)
        result = run_job(template, job, setup)
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(sink, result)


if __name__ == "__main__":
    main()
