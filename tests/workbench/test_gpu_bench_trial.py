"""benchmarks/gpu from start to end without a GPU: every section measures a tiny model or kernels in the interpreter, and reports."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.case import Case, Context, Machine, Plan
from benchmarks.gpu.records import Record
from benchmarks.gpu.sections import section
from benchmarks.gpu.worker import answer, release
from msgspec import convert, to_builtins

from penstock.execution.measurement.gpu_card import GPUCeilings
from penstock.execution.measurement.gpu_timing import copies_for, relative_error, time_in_turns

pytest.importorskip("triton", reason="Triton is not installed here")

PLAN = Plan("cpu", tiny=True, rounds=2)
ROOT = Path(__file__).resolve().parents[2]
# transformers is imported, and sampling kernels are interpreted, for many seconds.
SLOW = ("transformers", "kernels/sampling")


@pytest.fixture(scope="module")
def ceilings() -> dict[str, Any]:
    """What the first case of every run finds."""
    (case,) = section("ceilings").cases(PLAN)
    kind, data = answer(case, Context(PLAN))
    assert kind == "data", data
    return dict(data)


def measured(case: Case, context: Context, ceilings: dict[str, Any]) -> Record:
    """A case as the driver would store it."""
    kind, data = answer(case, context)
    assert kind == "data", f"{case.key}: {data}"
    return Record(
        section=case.section,
        case=case.name,
        machine=convert(ceilings["machine"], Machine),
        commit="c",
        call="now",
        date="2026-11-21",
        seconds=0.1,
        ceilings=to_builtins(ceilings["ceilings"]),
        data=data,
    )


def run_section(name: str, ceilings: dict[str, Any], *, slow: bool = False) -> list[Record]:
    context = Context(PLAN, GPUCeilings(**ceilings["ceilings"]))
    cases = [case for case in section(name).cases(PLAN) if slow or not case.key.startswith(SLOW)]
    try:
        records = [measured(case, context, ceilings) for case in cases]
    finally:
        release(context)
    for record in records:
        assert section(name).line(record.data or {}, record)
    return records


@pytest.mark.parametrize(
    "name", ["single_stream", "batch", "nano_vllm", "first_token", "overlap", "prefix_cache", "compiled"]
)
def test_a_section_measures_and_reports(name: str, ceilings: dict[str, Any]) -> None:
    records = run_section(name, ceilings)
    text = "\n".join(section(name).report(records))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) >= 3
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "prefill_attention"])
def test_interpreted_kernels_are_right(name: str, ceilings: dict[str, Any]) -> None:
    records = run_section(name, ceilings)
    text = "\n".join(section(name).report(records))
    figures = [figure for record in records for figure in (record.data or {})["figures"]]
    assert figures
    assert [figure for figure in figures if not figure["error"] <= figure["tolerance"]] == []
    assert text.count("| yes |") == len(figures)


def test_what_an_engine_counts_is_stored_with_the_figure(ceilings: dict[str, Any]) -> None:
    (record,) = run_section("nano_vllm", ceilings)
    data = record.data or {}
    assert len(data["tokens_per_s"]) == PLAN.rounds
    assert data["cached_tokens"] == 0
    assert data["steps"] >= PLAN.rounds
    assert data["engine"]["weights"] == "bfloat16"


def test_copies_are_more_than_a_cache_holds_but_not_without_end() -> None:
    assert copies_for(2**20) == 64
    assert copies_for(50e6) == 5
    assert copies_for(1e12) == 1


def test_a_result_that_is_no_number_is_infinitely_wrong() -> None:
    expected = torch.ones(4)
    assert relative_error(expected * 1.01, expected) == pytest.approx(0.01)
    assert relative_error(torch.tensor([1.0, 1.0, math.nan, 1.0]), expected) == math.inf


def test_implementations_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    runs = {name: lambda copy, name=name: order.append(f"{name}{copy}") for name in "ab"}
    timing = time_in_turns(runs, 1, torch.device("cpu"), rounds=3)
    assert order == ["a0", "b0", "a0", "b0", "b0", "a0", "a0", "b0"]
    assert {name: len(seconds) for name, seconds in timing.seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.gpu
def test_a_gpu_replays_a_copy_at_a_believable_rate() -> None:
    source = torch.ones(2**26, device="cuda")
    target = torch.empty_like(source)
    timing = time_in_turns({"": lambda _: target.copy_(source)}, 1, torch.device("cuda"), rounds=3)
    assert timing.eager == ()
    assert 1e11 < 2 * source.nbytes / min(timing.seconds[""]) < 2e13


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_script_in_processes_of_its_own_and_resumed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": "src"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--output", str(tmp_path)]
    command += ["--commit", "trial"]

    def call(*more: str) -> str:
        done = subprocess.run(
            [*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "## Failed" not in call()
    lines = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert all("error" not in json.loads(line) or json.loads(line)["error"] is None for line in lines)
    assert "## Beside transformers" in (tmp_path / "gpu_cpu-smoke.md").read_text()
    assert list(tmp_path.glob("gpu_cpu-smoke_prefill_attention.*"))
    again = call("--resume")
    assert f"{len(lines) - 1} cases were there already" in again
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == len(lines) + 1
