"""Results on disk: one line of JSON for each case, written when the case is done, so that a run that is killed loses one case at most.

    {"section", "case", "machine", "commit", "call", "date", "seconds", "ceilings", "data" or "error"}

`call` tells runs of the script apart; `ceilings` are those of the same call. A line that was cut off by an interruption is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from benchmarks.common import commit as checkout_commit
from benchmarks.gpu.case import NO_GPU, Machine, Plan

ROOT = Path(__file__).resolve().parents[2]
FILE = "gpu.jsonl"
# What figures depend on: the engine, and how it is measured.
SOURCES = ("src/penstock", "benchmarks/gpu")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One measured case. Exactly one of `data` and `error` says something."""

    section: str
    case: str
    machine: Machine
    commit: str
    call: str
    date: str
    seconds: float
    ceilings: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    error: str | None = None

    @property
    def key(self) -> str:
        return f"{self.section}/{self.case}"

    @property
    def plan(self) -> Plan:
        """What the run was asked for, as far as models depend on it."""
        tiny = self.machine.gpu == NO_GPU
        return Plan("cpu" if tiny else "cuda", tiny, 1)


class Records:
    """All records of one folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._records = list(self._read())

    def append(self, record: Record) -> None:
        """Write a record and have it on the disk on return."""
        self._records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("ab") as file:
            file.write((b"" if whole else b"\n") + msgspec.json.encode(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def latest(self, machine: Machine, commit: str, *, besides: str = "") -> dict[str, Record]:
        """The newest record of each case of this kind of machine and commit but `besides`; one with data before one that failed."""
        found: dict[str, Record] = {}
        for record in self._records:
            if record.key == besides:
                continue
            known = found.get(record.key)
            same = record.machine.kind == machine.kind and record.commit == commit
            if same and not (known and known.data and not record.data):
                found[record.key] = record
        return found

    def all_of(self, key: str, machine: Machine, commit: str) -> list[Record]:
        """Every record of one case, the oldest first."""
        wanted = (key, machine.kind, commit)
        return [record for record in self._records if (record.key, record.machine.kind, record.commit) == wanted]

    def done(self, machine: Machine, commit: str) -> set[str]:
        """Cases that need not be measured again."""
        return {key for key, record in self.latest(machine, commit).items() if record.data is not None}

    def _read(self) -> Iterator[Record]:
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                yield msgspec.json.decode(line, type=Record)
            except msgspec.MsgspecError:
                continue


def source_version(root: Path = ROOT, sources: Sequence[str] = SOURCES) -> str:
    """The checkout's commit; outside of one, or when tracked files differ from it, a hash of the sources."""
    commit = checkout_commit()
    if commit and not commit.endswith("+"):
        return commit
    digest = hashlib.sha256()
    for folder in sources:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"sources-{digest.hexdigest()[:12]}"


def write_atomically(path: Path, text: str) -> None:
    """The file has either its former content or `text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def as_json(value: Any) -> Any:
    """What JSON can hold of `value`."""
    return json.loads(msgspec.json.encode(value))
