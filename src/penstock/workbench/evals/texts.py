"""Evaluation texts: files of documents, and documents cut into windows that a model can take."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import ConfigError


@dataclass(frozen=True)
class Window:
    """Part of a document. first_scored: index of the first token whose probability counts; those before it are context only."""

    token_ids: list[int]
    first_scored: int

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.first_scored


def read_documents(source: str, flag: str) -> list[str]:
    """The documents of a file, or of stdin for "-". A file is one document; FILE.jsonl has one per line, in the field "text".

    Raises ConfigError, naming `flag`, for what cannot be read and for a file without text.
    """
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {source} is not UTF-8 text; convert it first.") from error
    except OSError as error:
        raise ConfigError(f"{flag} {source} cannot be read: {error.strerror}.") from error
    documents = _json_documents(text, source, flag) if source.endswith(".jsonl") else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ConfigError(f"{flag} {source} has no text.")
    return documents


def _json_documents(text: str, source: str, flag: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{flag} {source}, line {number} is not valid JSON: {error}.") from error
        document = value.get("text") if isinstance(value, dict) else None
        if not isinstance(document, str):
            raise ConfigError(f'{flag} {source}, line {number} must be an object with the text in "text".')
        documents.append(document)
    return documents


def split_document(
    token_ids: Sequence[int], window: int, stride: int, bos_token_id: int | None = None
) -> Iterator[Window]:
    """Windows of at most `window` tokens in which every token of the document but the first is scored exactly once.

        |<------- window ------->|                    the first: all but its first token are scored
                |<------- window ------->|            then `stride` new tokens at a time, behind as much context as fits
                                 |stride |

    `bos_token_id`, where given, is put before windows that begin inside of the document. 1 <= stride < window.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride must be at least 1 and below the window of {window}, not {stride}")
    if len(token_ids) < 2:
        return
    done = min(window, len(token_ids))
    yield Window(list(token_ids[:done]), 1)
    opening = [] if bos_token_id is None else [bos_token_id]
    while done < len(token_ids):
        end = min(done + stride, len(token_ids))
        start = end - (window - len(opening))
        yield Window([*opening, *token_ids[start:end]], len(opening) + done - start)
        done = end
