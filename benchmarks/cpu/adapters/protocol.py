"""What every adapter speaks: one JSON object per line, commands on stdin and answers on stdout.

    {"do": "load", "settings": {...}}                               → {"versions": {...}, "notes": "..."}
    {"do": "generate", "prompts": [[ids]], "output_tokens": n}      → {"seconds": s, "cpu_seconds": s, "tokens": [n, ...]}
    {"do": "quit"}                                                  → {}

An answer with "error" says why a command failed; the worker goes on. Whatever an engine prints goes to stderr.

Adapters run under the interpreter of the engine that they drive, so that nothing here imports more than the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Engine(Protocol):
    """An engine that is loaded. `versions`: package → version; `notes`: what a reader of the table should know."""

    versions: dict[str, str]
    notes: str

    def prepare(self, requests: int, tokens: int) -> None:
        """Get ready, untimed, for `requests` at once of at most `tokens` tokens each, prompt and output."""

    def generate(self, prompts: Sequence[list[int]], output_tokens: int) -> list[int]:
        """Complete all prompts greedily with exactly `output_tokens` each; how many every one got."""


def serve(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Answer commands until `quit` or the end of stdin."""
    # The engine's own prints must not end up between answers: they get stderr, we keep the pipe.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            match command["do"]:
                case "quit":
                    print("{}", file=answers)
                    break
                case "load":
                    engine = load(command["settings"])
                    answer = {"versions": engine.versions, "notes": engine.notes}
                case "generate" if engine is not None:
                    answer = _timed(engine, command["prompts"], command["output_tokens"])
                case other:
                    answer = {"error": f"{other!r} is not possible now"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:2000]}
        print(json.dumps(answer), file=answers)


def _timed(engine: Engine, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    engine.prepare(len(prompts), max(map(len, prompts)) + output_tokens)
    cpu, started = time.process_time(), time.perf_counter()
    tokens = engine.generate(prompts, output_tokens)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "tokens": tokens}
