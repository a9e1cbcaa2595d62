"""The controller in a simulated engine: a machine with a cost of steps, and requests whose drafts are accepted at known rates."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from penstock.engine.executor import SpeculationProfile
from penstock.engine.speculation import SpeculationController

MAX_DRAFTS = 8


@dataclass(frozen=True)
class Machine:
    """Seconds of a step by its tokens, and of a pass of the draft model by its requests; 0 without a draft model."""

    step: Callable[[int], float]
    draft: Callable[[int], float]

    def proposing(self, lengths: Sequence[int]) -> float:
        passes = (sum(length >= index for length in lengths) for index in range(1, MAX_DRAFTS + 1))
        return sum(self.draft(count) for count in passes if count)

    @staticmethod
    def profile() -> SpeculationProfile:
        return SpeculationProfile(MAX_DRAFTS, adaptive=True)


MACHINES = {
    "knee": Machine(lambda n: 0.010 + 0.0003 * max(0, n - 32), lambda r: 0.0005 + 0.00001 * r),
    "late knee": Machine(lambda n: 0.010 + 0.00005 * max(0, n - 200), lambda r: 0.0008),
    "linear": Machine(lambda n: 0.0002 * n, lambda r: 0.00001 * r),
    "both": Machine(lambda n: 0.002 + 0.0002 * n, lambda r: 0.0001 + 0.00001 * r),
    "costly drafts": Machine(lambda n: 0.010 + 0.00002 * n, lambda r: 0.004),
    "n-gram": Machine(lambda n: 0.004 + 0.0001 * n, lambda r: 0.0),
}
MIXES: dict[str, Callable[[int], float]] = {
    "poor": lambda index: 0.2,
    "fair": lambda index: 0.55,
    "good": lambda index: 0.92,
    "mixed": lambda index: (0.2, 0.95, 0.4, 0.8, 0.6)[index % 5],
}


@dataclass
class Engine:
    """Requests that decode forever. A request's rate may depend on the step; every so often one ends, and another takes its place."""

    controller: SpeculationController
    machine: Machine
    rate: Callable[[int, int], float]
    concurrency: int
    noise: float = 0.05
    lifetime: int = 300
    hit_rate: float = 1.0
    numbers: random.Random = field(default_factory=lambda: random.Random(5))
    tokens: int = 0
    seconds: float = 0.0
    step: int = 0
    num_drafts: int = 0
    drafts: list[int] = field(default_factory=list)

    def run(self, num_steps: int) -> float:
        """Tokens per second of so many steps."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(num_steps):
            self._step()
        return (self.tokens - tokens) / (self.seconds - seconds)

    def _key(self, index: int) -> str:
        return f"{index}-{(self.step + index * 7) // self.lifetime}/0"

    def _step(self) -> None:
        keys = [self._key(index) for index in range(self.concurrency)]
        drafts = self.drafts if len(self.drafts) == len(keys) else [0] * len(keys)
        rests = self.controller.rests(len(keys))
        wanted = [0] * len(keys) if rests else self.controller.plan(keys, 0)
        num_tokens = len(keys) + sum(drafts)
        factor = self.numbers.lognormvariate(0.0, self.noise) if self.noise else 1.0
        draft_seconds = self.machine.proposing(wanted) * factor
        seconds = self.machine.step(num_tokens) * factor + draft_seconds
        self.controller.step_done(len(keys), 0, seconds, draft_seconds)
        self.seconds += seconds
        self.tokens += len(keys)
        self.num_drafts += sum(drafts)
        for index, count in enumerate(drafts):
            if count:
                rate, accepted = self.rate(index, self.step), 0
                while accepted < count and self.numbers.random() < rate:
                    accepted += 1
                self.tokens += accepted
                self.controller.verified(keys[index], count, accepted)
        self.drafts = list(wanted)
        if self.hit_rate < 1.0:
            self._lose_proposals()
        self.step += 1
        for index, key in enumerate(keys):
            if key != self._key(index):
                self.controller.forget(key)

    def _lose_proposals(self) -> None:
        for index, count in enumerate(self.drafts):
            if count and self.numbers.random() >= self.hit_rate:
                self.drafts[index] = 0


def _throughput_of(machine: Machine, rates: Sequence[float], length: int) -> float:
    """Tokens per second with a fixed length, exactly."""
    tokens = sum(sum(rate**index for index in range(length + 1)) for rate in rates)
    count = len(rates)
    return tokens / (machine.step(count * (1 + length)) + machine.proposing([length] * count))


def _constant(rate: float) -> Callable[[int, int], float]:
    return lambda index, step: rate


def _each(rates: Sequence[float]) -> Callable[[int, int], float]:
    return lambda index, step: rates[index]


@pytest.mark.parametrize("machine", list(MACHINES))
@pytest.mark.parametrize("concurrency", [1, 4, 16, 64])
def test_adaptive_lengths_are_as_fast_as_the_best_fixed_one_and_never_slower_than_none(
    machine: str, concurrency: int
) -> None:
    for mix in MIXES.values():
        rates = [mix(index + (concurrency == 1) * 2) for index in range(concurrency)]
        controller = SpeculationController(MACHINES[machine].profile())
        engine = Engine(controller, MACHINES[machine], _each(rates), concurrency)
        engine.run(100)
        adaptive = engine.run({1: 1500, 4: 600, 16: 300, 64: 150}[concurrency])
        fixed = [_throughput_of(MACHINES[machine], rates, length) for length in range(MAX_DRAFTS + 1)]
        assert adaptive >= 0.97 * fixed[0]
        # Lengths come in steps: with 4 requests and room for 32 tokens 7 drafts are best, and there are only 4 and 8 to choose from.
        assert adaptive >= 0.92 * max(fixed)


def test_a_request_that_turns_from_copying_to_writing_and_back_is_followed() -> None:
    machine = MACHINES["knee"]

    def rate(index: int, step: int) -> float:
        return 0.03 if 2000 <= step < 4000 else 0.95

    engine = Engine(SpeculationController(machine.profile()), machine, rate, concurrency=1, lifetime=10_000)
    for phase_rate, settling in ((0.95, 100), (0.03, 200), (0.95, 1000)):
        engine.run(settling)
        adaptive = engine.run(2000 - settling)
        fixed = [_throughput_of(machine, [phase_rate], length) for length in range(MAX_DRAFTS + 1)]
        assert adaptive >= max(0.97 * fixed[0], 0.85 * max(fixed))


def test_trials_are_rare_while_drafts_do_not_pay() -> None:
    for name in ("costly drafts", "linear"):
        engine = Engine(SpeculationController(MACHINES[name].profile()), MACHINES[name], _constant(0.1), 4)
        engine.run(300)
        engine.num_drafts = 0
        engine.run(6000)
        assert 3 < engine.num_drafts < 1000


def test_a_large_batch_begins_without_drafts_where_a_small_one_lost_by_them() -> None:
    controller = SpeculationController(MACHINES["linear"].profile())
    engine = Engine(controller, MACHINES["linear"], _constant(0.7), 4)
    engine.run(200)
    engine.concurrency, engine.num_drafts, engine.drafts = 32, 0, []
    engine.run(400)
    assert engine.num_drafts == 0


def test_drafts_begin_when_the_batch_shrinks() -> None:
    machine, rate = MACHINES["knee"], 0.8
    engine = Engine(SpeculationController(machine.profile()), machine, _constant(rate), concurrency=64)
    engine.run(400)
    engine.concurrency, engine.drafts = 2, []
    engine.run(100)
    fixed = [_throughput_of(machine, [rate] * 2, length) for length in range(MAX_DRAFTS + 1)]
    assert engine.run(600) >= 0.9 * max(fixed)


def test_rare_proposals_of_good_quality_are_asked_for_and_long() -> None:
    """What n-grams find once in twenty steps is right nearly always."""
    machine = MACHINES["n-gram"]
    engine = Engine(SpeculationController(machine.profile()), machine, _constant(0.95), 4, noise=0.0, hit_rate=0.05)
    engine.run(400)
    wanted = [engine.controller.plan([engine._key(index) for index in range(4)], 0) for _ in range(20)]
    assert sum(map(sum, wanted)) / 80 > 3
    assert engine.run(1000) > 1.1 * _throughput_of(machine, [0.95] * 4, 0)


def test_looking_for_proposals_in_vain_stops_where_it_takes_time() -> None:
    # The profile knows of no cost of proposing; the look-ups take a tenth of a step.
    machine = Machine(lambda n: 0.001 + 0.00001 * n, lambda r: 0.0)
    lookups = Machine(machine.step, lambda r: 0.0001 / MAX_DRAFTS)
    engine = Engine(SpeculationController(machine.profile()), lookups, _constant(0.9), concurrency=1, hit_rate=0.0)
    engine.run(300)
    assert engine.run(1000) >= 0.98 * _throughput_of(machine, [0.0], 0)


def test_others_in_the_step_count() -> None:
    """Requests that cannot have drafts belong to the batch, and what is known of small batches is not believed of it."""
    controller = SpeculationController(MACHINES["knee"].profile())
    Engine(controller, MACHINES["knee"], _constant(0.9), concurrency=1).run(200)
    assert not controller.rests(1)
    Engine(controller, MACHINES["knee"], _constant(0.9), concurrency=64).run(200)
    assert controller.plan(["a/0"], 0)[0] > 0
    assert controller.rests(64)
    assert controller.plan(["a/0"], 63) == [0]


def test_fixed_lengths_stay() -> None:
    controller = SpeculationController(SpeculationProfile(5))
    for _ in range(50):
        assert controller.plan(["a/0", "b/0"], 1) == [5, 5]
        controller.verified("a/0", 5, 0)
        controller.step_done(3, 0, 1.0, 0.9)
    assert controller.plan([], 3) == []


def test_requests_that_ended_are_forgotten() -> None:
    controller = SpeculationController(SpeculationProfile(4, adaptive=True))
    Engine(controller, MACHINES["late knee"], _constant(0.9), concurrency=1, lifetime=10**6).run(200)
    known = len(controller._acceptances)
    for number in range(200):
        key = f"new-{number}/0"
        assert controller.plan([key], 0)[0] > 0
        controller.verified(key, 4, 3)
        controller.forget(key)
        # The result of a step that was in flight when the request ended.
        controller.verified(key, 4, 3)
    assert len(controller._acceptances) == known
