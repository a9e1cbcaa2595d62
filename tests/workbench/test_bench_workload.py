"""Prompts have exact lengths and shares and depend on the seed alone; arrivals are reproducible and on time."""

from __future__ import annotations

import asyncio
import itertools
import statistics

import pytest

from penstock.core.errors import ConfigError
from penstock.workbench.bench.arrival import ClosedLoop, OpenLoop, drive
from penstock.workbench.bench.workload import BenchRequest, Lengths, Workload


def workload(**changes: object) -> Workload:
    settings: dict[str, object] = {"input_lengths": Lengths(100, 100), "output_lengths": Lengths(8, 8), "seed": 1}
    return Workload(**(settings | changes))  # type: ignore[arg-type]


def ids(request: BenchRequest) -> list[int]:
    assert isinstance(request.prompt, list)
    return request.prompt


def common_prefix(left: list[int], right: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def test_lengths_are_exact_and_inside_the_bounds() -> None:
    requests = workload(input_lengths=Lengths(10, 20), output_lengths=Lengths(3, 5)).requests(200)
    assert {len(ids(request)) for request in requests} == set(range(10, 21))
    assert all(request.prompt_tokens == len(ids(request)) for request in requests)
    assert {request.max_tokens for request in requests} == {3, 4, 5}
    assert all(300 <= token < 4000 for request in requests for token in ids(request))


@pytest.mark.parametrize(("text", "expected"), [("7", Lengths(7, 7)), ("2:9", Lengths(2, 9))])
def test_lengths_are_parsed(text: str, expected: Lengths) -> None:
    assert Lengths.parse(text) == expected


@pytest.mark.parametrize("text", ["", "0", "9:2", "a", "1:2:3", "-4", "1.5"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Lengths.parse(text)


def test_same_seed_same_prompts_and_each_depends_on_its_number_only() -> None:
    assert workload().requests(5) == workload().requests(5)
    assert workload().requests(5)[3:] == workload().requests(2, first=3)
    assert workload().requests(1) != workload(seed=2).requests(1)


@pytest.mark.parametrize(("share", "shared"), [(0.0, 0), (0.25, 25), (0.9, 90), (1.0, 100)])
def test_shared_prefix_is_exact(share: float, shared: int) -> None:
    first, *others = workload(prefix_share=share).requests(8)
    assert [common_prefix(ids(first), ids(other)) for other in others] == [shared] * 7


def test_shared_prefix_scales_with_each_prompt() -> None:
    longest, *others = sorted(
        workload(prefix_share=0.5, input_lengths=Lengths(40, 80)).requests(20), key=lambda r: -len(r.prompt)
    )
    for other in others:
        half = round(0.5 * len(other.prompt))
        assert ids(other)[:half] == ids(longest)[:half]


def test_prefix_groups_take_turns() -> None:
    requests = workload(prefix_share=0.5, prefix_groups=3).requests(6)
    heads = [tuple(ids(request)[:50]) for request in requests]
    assert heads[:3] == heads[3:]
    assert len(set(heads)) == 3


def test_text_prompts_have_words() -> None:
    request = workload(text=True).requests(1)[0]
    assert isinstance(request.prompt, str)
    assert len(request.prompt.split()) == 100
    assert request.prompt_tokens is None


@pytest.mark.parametrize("changes", [{"prefix_share": 1.1}, {"prefix_groups": 0}, {"token_range": (5, 5)}])
def test_wrong_workloads_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        workload(**changes)


def test_poisson_arrivals_are_reproducible_with_the_right_mean() -> None:
    times = OpenLoop(rate=50.0, seed=3).times(5000)
    assert times == OpenLoop(rate=50.0, seed=3).times(5000)
    assert times != OpenLoop(rate=50.0, seed=4).times(5000)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) > 0
    # Exponential gaps: standard deviation equals the mean; 5,000 of them put both within 5 %.
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_wrong_rates_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError):
        OpenLoop(rate)


def test_no_users_are_refused() -> None:
    with pytest.raises(ConfigError):
        ClosedLoop(0)


async def test_open_loop_never_waits_for_an_answer() -> None:
    sent: list[int] = []
    dues: list[float] = []
    everyone_came = asyncio.Event()

    async def send(item: int, due: float) -> int:
        sent.append(item)
        dues.append(due)
        if len(sent) == 20:
            everyone_came.set()
        await everyone_came.wait()
        return item * 10

    arrival = OpenLoop(rate=1000.0, seed=1)
    assert await drive(arrival, range(20), send) == [item * 10 for item in range(20)]
    assert sent == list(range(20))
    assert [due - dues[0] for due in dues] == pytest.approx(arrival.times(20))


async def test_closed_loop_keeps_exactly_its_concurrency() -> None:
    running, peaks = 0, []

    async def send(item: int, due: float) -> int:
        nonlocal running
        running += 1
        peaks.append(running)
        await asyncio.sleep(0)
        running -= 1
        return -item

    assert await drive(ClosedLoop(3), range(10), send) == [-item for item in range(10)]
    assert max(peaks) == 3
