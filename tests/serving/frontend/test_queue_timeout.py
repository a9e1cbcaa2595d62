"""The bound on waiting on its way to the engine and back."""

from __future__ import annotations

import pytest

from penstock.core.errors import OverloadedError
from penstock.core.types import SamplingParams, TokenDelta
from penstock.serving.frontend.client import GenerationRequest, TokensPrompt
from penstock.serving.frontend.request_state import RequestState
from penstock.testing.builders import make_engine, make_request


def make_state(queue_timeout_s: float | None) -> RequestState:
    sampling = SamplingParams(temperature=0.0, max_tokens=8, seed=0)
    request = GenerationRequest(
        request_id="r", prompt=TokensPrompt([1, 2, 3]), sampling=sampling, tenant="t", queue_timeout_s=queue_timeout_s
    )
    return RequestState(request, [1, 2, 3], sampling, None, None)


@pytest.mark.parametrize("queue_timeout_s", [None, 2.5])
def test_the_engine_is_told_how_long_a_request_may_wait(queue_timeout_s: float | None) -> None:
    state = make_state(queue_timeout_s)
    assert state.next_submission(0.0).queue_timeout_s == queue_timeout_s
    assert state.next_submission(0.0).queue_timeout_s == queue_timeout_s, (
        "again after a crash that it had not begun before"
    )


def test_a_request_that_showed_output_may_wait_as_long_as_it_takes_after_a_crash() -> None:
    state = make_state(2.5)
    state.next_submission(0.0)
    state.accept(TokenDelta(request_id="r", attempt=0, index=0, offset=0, token_ids=[5]))
    assert state.next_submission(1.0).queue_timeout_s is None


def test_waiting_too_long_is_an_overload_to_the_reader() -> None:
    now = [0.0]
    engine = make_engine(max_num_seqs=1, clock=lambda: now[0])
    engine.add(make_request())
    engine.step()
    state = make_state(2.5)
    engine.add(state.next_submission(0.0))
    now[0] = 3.0
    ((_, delta),) = engine.expire()
    with pytest.raises(OverloadedError, match="too long"):
        state.accept(delta)
