"""The engine's loop over an endpoint: several clients, clients that stop reading, clients that fall silent, draining."""

from __future__ import annotations

import threading
from collections import deque

from penstock.core.types import (
    CLIENT_TIMEOUT_S,
    Abort,
    Configure,
    Configured,
    Connect,
    Deltas,
    Disconnect,
    Drain,
    EngineRequest,
    FromEngine,
    Hello,
    LiveLimits,
    Ping,
    SamplingParams,
    Status,
    Submit,
    ToEngine,
    TokenDelta,
)
from penstock.engine.engine import Engine
from penstock.engine.process import EngineLoop
from penstock.testing.builders import make_engine, make_request
from penstock.testing.fake_model import expected_tokens


class ScriptedEndpoint:
    """An endpoint whose messages are given per round; stops the loop when the script ends and the engine is idle."""

    def __init__(self, script: list[list[tuple[bytes, ToEngine]]]) -> None:
        self.script = deque(script)
        self.sent: dict[bytes, list[FromEngine]] = {}
        self.full: set[bytes] = set()
        self.loop: EngineLoop | None = None
        self.engine: Engine | None = None
        self.rounds_left = 2000

    def receive(self, timeout_s: float) -> list[tuple[bytes, ToEngine]]:
        self.rounds_left -= 1
        if self.script:
            return self.script.popleft()
        assert self.loop is not None
        assert self.engine is not None
        assert self.rounds_left > 0, "the loop does not come to rest"
        if not self.engine.has_work():
            self.loop.stop()
        return []

    def send(self, client: bytes, message: FromEngine) -> bool:
        if client in self.full:
            return False
        self.sent.setdefault(client, []).append(message)
        return True

    def close(self) -> None:
        """Nothing to release."""

    def deltas(self, client: bytes) -> list[TokenDelta]:
        return [d for m in self.sent.get(client, []) if isinstance(m, Deltas) for d in m.deltas]

    def tokens(self, client: bytes, request: EngineRequest) -> list[int]:
        return [t for d in self.deltas(client) if d.request_id == request.request_id for t in d.token_ids]


def serve(endpoint: ScriptedEndpoint, engine: Engine, now: list[float] | None = None) -> EngineLoop:
    clock = now or [0.0]
    loop = EngineLoop(engine, endpoint, [("load", 1.0)], clock=lambda: clock[0])
    endpoint.loop, endpoint.engine = loop, engine
    return loop


def test_clients_are_told_apart_and_hear_only_their_own() -> None:
    one, two = make_request(range(5)), make_request(range(3, 9))
    endpoint = ScriptedEndpoint([[(b"a", Connect()), (b"b", Connect()), (b"a", Submit(one)), (b"b", Submit(two))]])
    serve(endpoint, make_engine()).run()
    for client, request in ((b"a", one), (b"b", two)):
        hello = endpoint.sent[client][0]
        assert isinstance(hello, Hello)
        assert hello.timeline == [("load", 1.0)]
        assert {d.request_id for d in endpoint.deltas(client)} == {request.request_id}
        assert endpoint.tokens(client, request) == expected_tokens(request.prompt_token_ids, request.sampling, 997)


def test_one_message_per_step_and_client() -> None:
    requests = [make_request(range(i, i + 4)) for i in range(4)]
    endpoint = ScriptedEndpoint([[(b"a", Submit(request)) for request in requests]])
    engine = make_engine()
    serve(endpoint, engine).run()
    messages = [m for m in endpoint.sent[b"a"] if isinstance(m, Deltas)]
    assert len(messages) == engine.stats().steps
    assert all(len(m.deltas) == 4 for m in messages)


def test_a_client_that_does_not_read_gets_merged_news_and_stops_nobody() -> None:
    slow, fast = make_request(range(5)), make_request(range(6))
    endpoint = ScriptedEndpoint([[(b"slow", Submit(slow)), (b"fast", Submit(fast))], [], [], []])
    endpoint.full = {b"slow"}
    loop = serve(endpoint, make_engine())
    loop.run()
    assert endpoint.tokens(b"fast", fast) == expected_tokens(fast.prompt_token_ids, fast.sampling, 997)
    assert endpoint.sent.get(b"slow") is None
    endpoint.full = set()
    endpoint.script = deque([[(b"fast", Ping())]])
    loop._stopped = False
    loop.run()
    (delta,) = endpoint.deltas(b"slow")
    assert delta.token_ids == expected_tokens(slow.prompt_token_ids, slow.sampling, 997)
    assert delta.finish_reason == "length"
    assert delta.offset == 0


def test_a_silent_client_is_dropped_and_its_blocks_come_back() -> None:
    now = [0.0]
    engine = make_engine()
    endless = make_request(sampling=SamplingParams(max_tokens=200, ignore_eos=True, seed=0))
    endpoint = ScriptedEndpoint([[(b"gone", Submit(endless)), (b"here", Connect())], [(b"here", Ping())]])
    loop = serve(endpoint, engine, now)
    original = endpoint.receive

    def receive(timeout_s: float) -> list[tuple[bytes, ToEngine]]:
        now[0] += CLIENT_TIMEOUT_S / 4
        return [*original(timeout_s), (b"here", Ping())]

    endpoint.receive = receive  # type: ignore[method-assign]
    loop.run()
    assert engine.stats().kv_blocks_used == 0
    assert len(endpoint.tokens(b"gone", endless)) < 50
    assert any(isinstance(m, Status) for m in endpoint.sent[b"here"])


def test_disconnect_and_abort_end_requests() -> None:
    endless = SamplingParams(max_tokens=200, ignore_eos=True, seed=0)
    one, two = make_request(sampling=endless), make_request(sampling=endless)
    endpoint = ScriptedEndpoint(
        [
            [(b"a", Submit(one)), (b"b", Submit(two))],
            [(b"a", Disconnect()), (b"b", Abort([two.request_id, "unknown"]))],
        ]
    )
    engine = make_engine()
    serve(endpoint, engine).run()
    assert endpoint.deltas(b"b")[-1].finish_reason == "abort"
    assert engine.stats().kv_blocks_used == 0


def test_limits_change_over_the_wire_and_bad_ones_are_refused() -> None:
    endpoint = ScriptedEndpoint(
        [[(b"a", Configure(1, LiveLimits(max_num_seqs=2))), (b"a", Configure(2, LiveLimits(max_num_seqs=99)))]]
    )
    serve(endpoint, make_engine(max_num_seqs=8)).run()
    good, bad = endpoint.sent[b"a"]
    assert isinstance(good, Configured)
    assert isinstance(bad, Configured)
    assert (good.call_id, good.limits.max_num_seqs, good.error) == (1, 2, None)
    assert bad.error is not None
    assert bad.error.param == "max_num_seqs"
    assert bad.limits.max_num_seqs == 2


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    running, refused = make_request(), make_request()
    endpoint = ScriptedEndpoint([[(b"a", Submit(running))], [(b"a", Drain()), (b"a", Submit(refused))], [], []])
    loop = serve(endpoint, make_engine())
    thread = threading.Thread(target=loop.run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "a drained engine leaves its loop by itself"
    assert len(endpoint.tokens(b"a", running)) == 8
    (refusal,) = [d for d in endpoint.deltas(b"a") if d.request_id == refused.request_id]
    assert refusal.error is not None
    assert refusal.error.status == 503
