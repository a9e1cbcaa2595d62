"""Where the time of a step goes is counted, and nothing is counted twice."""

from __future__ import annotations

import pytest

from penstock.core.types import SamplingParams
from penstock.engine.executor import StepHandle
from penstock.engine.step import RunnerOutput, SchedulerOutput
from penstock.telemetry.metrics import STEP_PHASES
from penstock.testing.builders import make_engine, make_request, run_to_end
from penstock.testing.fake_executor import FakeExecutor


class _Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class _TimedHandle:
    """A step whose result says what its parts took."""

    def __init__(self, handle: StepHandle) -> None:
        self._handle = handle

    def done(self) -> bool:
        return self._handle.done()

    def result(self) -> RunnerOutput:
        output = self._handle.result()
        output.prepare_seconds, output.forward_seconds, output.sample_seconds = 0.25, 2.0, 0.5
        output.draft_seconds = 0.125
        return output


class _DeviceHandle(_TimedHandle):
    """A step on a device that had waited a second for it."""

    def result(self) -> RunnerOutput:
        output = super().result()
        output.device_seconds, output.device_idle_seconds = 4.0, 1.0
        return output


class _DeviceExecutor(FakeExecutor):
    """Steps on a device."""

    def submit(self, step: SchedulerOutput) -> StepHandle:
        return _DeviceHandle(super().submit(step))


class _TimedExecutor(FakeExecutor):
    """Takes 2.875 seconds a step, within `submit`, as an executor that runs a step at once does."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def submit(self, step: SchedulerOutput) -> StepHandle:
        handle = super().submit(step)
        self._clock.now += 2.875
        return _TimedHandle(handle)


def test_phases_and_duration_of_steps_add_up() -> None:
    clock = _Clock()
    engine = make_engine(_TimedExecutor(clock), clock=clock)
    engine.add(make_request([1, 2, 3]))
    run_to_end(engine)
    stats = engine.stats()
    assert tuple(stats.step_phase_seconds) == STEP_PHASES
    assert stats.step_phase_seconds["forward"] == 2.0 * stats.steps
    assert stats.step_phase_seconds["prepare"] == 0.25 * stats.steps
    assert stats.step_phase_seconds["sample"] == 0.5 * stats.steps
    assert stats.step_phase_seconds["draft"] == 0.125 * stats.steps
    assert stats.step_phase_seconds["schedule"] == stats.step_phase_seconds["deliver"] == 0.0
    assert stats.step_seconds_sum == sum(stats.step_phase_seconds.values())


@pytest.mark.parametrize("depth", [1, 2])
def test_a_device_is_idle_only_while_there_is_work(depth: int) -> None:
    engine = make_engine(_DeviceExecutor(max_inflight=depth))
    engine.add(make_request([1, 2, 3]))
    run_to_end(engine)
    steps = engine.stats().steps
    assert steps > 2
    assert engine.stats().device_seconds == 4.0 * steps
    # The first step found a device that nobody had needed.
    assert engine.stats().device_idle_seconds == steps - 1
    engine.add(make_request([4, 5, 6]))
    engine.add(make_request([7, 8]))
    run_to_end(engine)
    assert engine.stats().device_idle_seconds == engine.stats().steps - 2


@pytest.mark.parametrize("depth", [1, 2])
def test_a_device_without_requests_is_not_waiting(depth: int) -> None:
    engine = make_engine(_DeviceExecutor(max_inflight=depth))
    request = make_request([1, 2, 3])
    engine.add(request)
    engine.step()
    engine.abort(b"", request.request_id)
    run_to_end(engine)
    idle = engine.stats().device_idle_seconds
    engine.add(make_request([4, 5, 6], sampling=SamplingParams(temperature=0.0, max_tokens=1, seed=0)))
    run_to_end(engine)
    assert engine.stats().device_idle_seconds == idle
