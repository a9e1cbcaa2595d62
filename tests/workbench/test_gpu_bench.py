"""benchmarks/gpu without a GPU: verdicts, records, a run that survives anything, and pages that do not flatter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from benchmarks.common import RESULTS
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.case import Case, Context, Machine, Plan, repeat
from benchmarks.gpu.driver import FIRST, Driver, RunError, by_group
from benchmarks.gpu.plot import prefill_series, svg
from benchmarks.gpu.records import Record, Records, source_version
from benchmarks.gpu.report import page
from benchmarks.gpu.sections import NAMES, all_cases, section
from benchmarks.gpu.targets import Target
from click.testing import CliRunner

from tests.workbench.fake_gpu_worker import CEILINGS, MACHINE, broken_work, fake_work

PLAN = Plan("cuda", tiny=False, rounds=7)


# ---- verdicts ----


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([99.0, 98, 97, 96, 95], "below must"),
        ([101.0, 102, 103, 104, 105], "must"),
        ([201.0, 202, 203, 204, 205], "good"),
        ([301.0] * 5, "stretch"),
        ([195.0, 198, 201, 204, 207], "undecided: must or good"),
        ([301.0] * 4, "undecided (n=4)"),
    ],
)
def test_a_level_is_reached_by_the_whole_interval_or_not_decided(values: list[float], verdict: str) -> None:
    assert Target(100, 200, 300).verdict(values) == verdict


def test_smaller_can_be_better_and_a_level_can_be_absent() -> None:
    target = Target(15, 8, None, smaller=True)
    assert [target.verdict([value] * 5) for value in (16.0, 10.0, 3.0)] == ["below must", "must", "good"]
    assert target.cells() == ["15", "8", "–"]


def test_rounds_stop_when_the_time_is_gone() -> None:
    assert repeat(lambda number: number, 5, 60.0) == [0, 1, 2, 3, 4]
    assert len(repeat(lambda _: time.sleep(0.02), 50, 0.1)) < 10


# ---- records ----


def record(case: str = "one", *, ok: bool = True, commit: str = "c1", machine: Machine = MACHINE) -> Record:
    name, _, rest = case.partition("/")
    return Record(
        section=name if rest else "demo",
        case=rest or name,
        machine=machine,
        commit=commit,
        call="2026-11-21T10:00:00+00:00",
        date="2026-11-21T10:00:01+00:00",
        seconds=1.0,
        ceilings=CEILINGS,
        data={"value": 1} if ok else None,
        error=None if ok else "RuntimeError: no",
    )


def test_records_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    Records(tmp_path).append(record("a"))
    path = tmp_path / "gpu.jsonl"
    with path.open("ab") as file:
        file.write(b'{"section":"demo","case":"b","mach')
    again = Records(tmp_path)
    assert again.done(MACHINE, "c1") == {"demo/a"}
    again.append(record("c"))
    assert Records(tmp_path).done(MACHINE, "c1") == {"demo/a", "demo/c"}


def test_only_results_of_the_same_machine_and_commit_count_as_done(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for each in (record("a"), record("b", commit="c2"), record("c", ok=False), record("d")):
        records.append(each)
    records.append(record("d", ok=False))
    assert records.done(MACHINE, "c1") == {"demo/a", "demo/d"}
    assert records.done(msgspec.structs.replace(MACHINE, gpu="Other"), "c1") == set()
    assert records.done(msgspec.structs.replace(MACHINE, versions={"torch": "2.12"}), "c1") == set()
    assert records.done(msgspec.structs.replace(MACHINE, cpu="another host"), "c1") == {"demo/a", "demo/d"}
    assert records.latest(MACHINE, "c1")["demo/c"].error == "RuntimeError: no"


def test_without_a_checkout_the_sources_name_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.records.checkout_commit", lambda: "")
    source = tmp_path / "src" / "a.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    first = source_version(tmp_path, ["src"])
    assert first == source_version(tmp_path, ["src"])
    source.write_text("x = 2\n")
    assert source_version(tmp_path, ["src"]) != first
    monkeypatch.setattr("benchmarks.gpu.records.checkout_commit", lambda: "abc123")
    assert source_version(tmp_path, ["src"]) == "abc123"


# ---- driver ----


def never(context: Context) -> dict[str, object]:
    raise AssertionError("cases are measured by the workers")


def fake_cases(*names: str, group: str = "g", expected_s: float = 0.0) -> list[Case]:
    first = Case("ceilings", "card", "ceilings", 10.0, never)
    return [first, *(Case("demo", name, group, expected_s, never) for name in names)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Driver, Records, list[str]]]:
    """Runs cases with the fake worker in `tmp_path`; gives the driver, the records and the cases that did not fit."""
    monkeypatch.setattr("benchmarks.gpu.driver.PROCESS_S", 0.0)

    def start(
        cases: list[Case], *, budget_s: float = 60.0, resume: bool = False, passed_s: float = 0.0
    ) -> tuple[Driver, Records, list[str]]:
        """passed_s: how much time seems to have passed when the ceilings are there."""
        records, passed = Records(tmp_path), [0.0]

        def say(record: Record) -> None:
            passed[0] = passed_s

        driver = Driver(PLAN, records, "c1", budget_s, fake_work, say=say, clock=lambda: time.monotonic() + passed[0])
        left = driver.run(cases, resume=resume)
        return driver, Records(tmp_path), left.out_of_time

    return start


Run = Callable[..., tuple[Driver, Records, list[str]]]


def test_a_group_shares_a_process_and_knows_the_ceilings(run: Run) -> None:
    driver, records, left = run(fake_cases("a", "b"))
    found = records.latest(MACHINE, "c1")
    assert left == []
    assert driver.machine == MACHINE
    a, b = (found[key].data or {} for key in ("demo/a", "demo/b"))
    assert a["pid"] == b["pid"] != os.getpid()
    assert a["bandwidth"] == 4.3e12
    assert found["demo/a"].ceilings == CEILINGS


def test_a_case_that_dies_fails_or_breaks_the_card_takes_no_other_along(run: Run) -> None:
    _, records, _ = run(fake_cases("a", "dies", "b", "fails", "broken", "c"))
    found = records.latest(MACHINE, "c1")
    assert found["demo/dies"].error == "the process ended with code 7"
    assert found["demo/fails"].error == "ValueError: no"
    assert found["demo/broken"].error == "the card is gone"
    pids = [(found[f"demo/{name}"].data or {})["pid"] for name in "abc"]
    assert len(set(pids)) == 3


def test_a_case_that_hangs_is_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.driver.LEAST_PATIENCE_S", 1.0)
    _, records, left = run(fake_cases("hangs", "a"))
    found = records.latest(MACHINE, "c1")
    assert found["demo/hangs"].error == "no result after 1 s"
    assert found["demo/a"].data is not None
    assert left == []


def test_what_does_not_fit_is_left_without_a_record_and_measured_by_the_next_call(run: Run) -> None:
    cases = [*fake_cases("a"), *fake_cases("long", group="h", expected_s=1000.0)[1:]]
    _, records, left = run(cases)
    assert left == ["demo/long"]
    assert records.done(MACHINE, "c1") == {FIRST, "demo/a"}
    before = (records.latest(MACHINE, "c1")["demo/a"].data or {})["pid"]
    _, records, left = run(cases, budget_s=3000.0, resume=True)
    found = records.latest(MACHINE, "c1")
    assert left == []
    assert (found["demo/a"].data or {})["pid"] == before
    assert found["demo/long"].data is not None
    assert len(records.all_of(FIRST, MACHINE, "c1")) == 2


def test_a_case_that_outlasts_the_call_leaves_no_record(run: Run) -> None:
    cases = [*fake_cases("hangs"), *fake_cases("a", group="h", expected_s=5.0)[1:]]
    _, records, left = run(cases, budget_s=60.0, passed_s=57.0)
    assert left == ["demo/hangs", "demo/a"]
    assert records.done(MACHINE, "c1") == {FIRST}


def test_without_ceilings_nothing_is_measured(tmp_path: Path) -> None:
    driver = Driver(PLAN, Records(tmp_path), "c1", 60.0, broken_work, say=lambda record: None)
    with pytest.raises(RunError, match="no CUDA GPUs"):
        driver.run(fake_cases("a"), resume=False)
    assert not (tmp_path / "gpu.jsonl").exists()


def test_groups_stay_together_in_the_order_of_their_first_case() -> None:
    names = [("a", "x"), ("b", "y"), ("c", "x")]
    cases = [Case("demo", name, group, 1.0, never) for name, group in names]
    assert [[case.name for case in group] for group in by_group(cases)] == [["a", "c"], ["b"]]


# ---- the script ----


def test_every_section_has_cases_with_names_of_their_own() -> None:
    for plan in (PLAN, Plan("cpu", tiny=True, rounds=2)):
        cases = all_cases(plan)
        assert len({case.key for case in cases}) == len(cases)
        assert cases[0].key == FIRST
    assert {case.section for case in all_cases(PLAN)} == set(NAMES)
    assert all(case.expected_s + case.load_s < 400 for case in all_cases(PLAN))


def test_a_trial_never_writes_into_the_results(tmp_path: Path) -> None:
    runner = CliRunner()
    refused = runner.invoke(main, ["--tiny", "--device", "cpu", "--output", str(RESULTS)])
    assert refused.exit_code == 2
    assert "writes no results" in refused.output
    for wrong in (["--device", "cpu"], ["--tiny"]):
        assert "belong together" in runner.invoke(main, [*wrong, "--output", str(tmp_path)]).output
    assert "no section nonsense" in runner.invoke(main, ["--sections", "nonsense"]).output
    listed = runner.invoke(main, ["--list", "--sections", "nano_vllm"]).output
    assert "nano_vllm/qwen3-0.6b" in listed
    assert "batch/" not in listed


def single_stream_record(rates: list[float]) -> Record:
    data = {
        "shape": "tinyllama-1.1b",
        "precision": "bf16",
        "tokens_per_s": rates,
        "step_bytes": 2.15e9,
        "context": 160.0,
        "engine": {"weights": "bfloat16"},
    }
    known = record("single_stream/tinyllama-1.1b bf16")
    return msgspec.structs.replace(known, data=data)


def test_a_page_has_shares_of_the_ceiling_targets_and_failures() -> None:
    records = [single_stream_record([1300.0, 1310, 1305, 1302, 1308]), record("batch/x", ok=False)]
    text = page(records, MACHINE, "c1", tiny=False)
    assert "- GPU: NVIDIA Test, 139.0 GiB, 132 multiprocessors, CUDA 13.0" in text
    # 1,305 tok/s of 2.15 GB are 2,806 GB/s of 4,300.
    assert "| 1,305 (1,300–1,310, n=5) | 2,806 | 65% | 2,000 |" in text
    assert "| 1,000 | 1,250 | 1,600 | good |" in text
    assert "- batch/x: RuntimeError: no" in text
    assert "trial" not in text
    assert "says nothing about anything" in page(records, MACHINE, "c1", tiny=True)


def prefill_record() -> Record:
    figures = [
        {"rows": rows, "operations": 1e9 * rows, "seconds": {"": [1e-3 * rows] * 3, "SDPA flash": [2e-3 * rows] * 3}}
        for rows in (512, 128)
    ]
    known = record("prefill_attention/tinyllama-1.1b")
    return msgspec.structs.replace(known, data={"figures": figures})


def test_the_picture_has_a_line_for_each_implementation() -> None:
    series = prefill_series([prefill_record(), record("demo/other")])
    assert series == {
        "Penstock, tinyllama-1.1b": [(128.0, 1.0), (512.0, 1.0)],
        "SDPA flash, tinyllama-1.1b": [(128.0, 0.5), (512.0, 0.5)],
    }
    drawing = ElementTree.fromstring(svg(series, "tokens", "TFLOP/s", "A & B"))  # noqa: S314 - our own
    lines = drawing.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2
    heights = [{point.split(",")[1] for point in line.attrib["points"].split()} for line in lines]
    assert all(len(height) == 1 for height in heights)
    assert float(heights[0].pop()) < float(heights[1].pop())


def test_kernel_tables_name_wrong_results_and_the_faster_of_two() -> None:
    figure = {
        "kernel": "linear int4 g128",
        "shape": "o 4096x4096",
        "rows": 1,
        "bytes_moved": 8.6e6,
        "operations": 3.4e7,
        "ceiling_s": 2e-6,
        "seconds": {"": [4e-6] * 15, "torch int4 (tinygemm)": [6e-6] * 15, "cuBLAS 16 bit": [3e-6] * 15},
        "eager": [],
        "absent": {"torch int8": "RuntimeError: not built"},
        "error": 0.5,
        "tolerance": 6e-3,
    }
    known = record("kernels/linear int4 g128 llama-3.1-8b")
    stored = msgspec.structs.replace(known, data={"figures": [figure]})
    text = "\n".join(section("kernels").report([stored]))
    assert "NO: 5.0e-01 > 6.0e-03" in text
    assert "| 4.0 | 2,150 | 8.5 | 50% |" in text
    assert "torch int4 (tinygemm) 1.50 (1.50–1.50, n=15); cuBLAS 16 bit 0.75" in text
    assert "torch int8: cannot run" in text
    assert text.rstrip().endswith("| cuBLAS 16 bit |")
