"""The sections of the GPU benchmark, in the order in which they are measured and reported.

A section is a module with `TITLE`, `cases(plan)`, `line(data, record)` (a finished case in a few words) and `report(records)` (Markdown).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from benchmarks.gpu.case import Case, Plan
from benchmarks.gpu.records import Record

NAMES = (
    "ceilings",
    "kernels",
    "prefill_attention",
    "single_stream",
    "batch",
    "nano_vllm",
    "offline",
    "first_token",
    "overlap",
    "prefix_cache",
    "transformers",
    "compiled",
)


class Section(Protocol):
    """See the module's description."""

    TITLE: str

    def cases(self, plan: Plan) -> list[Case]: ...

    def line(self, data: dict[str, Any], record: Record) -> str: ...

    def report(self, records: Sequence[Record]) -> list[str]: ...


def section(name: str) -> Section:
    """A section by name."""
    return cast(Section, import_module(f"benchmarks.gpu.sections.{name}"))


def all_cases(plan: Plan, names: Sequence[str] = NAMES) -> list[Case]:
    """The cases of some sections, the ceilings always first."""
    chosen = [name for name in NAMES if name in names or name == "ceilings"]
    return [case for name in chosen for case in section(name).cases(plan)]
