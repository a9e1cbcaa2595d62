import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.core.framing import FrameSocket
from penstock.execution.runner.rank_group import Rank
from penstock.execution.runner.rank_join import (
    KEY_VARIABLE,
    Joining,
    JoinRefusedError,
    await_ranks,
    join,
    parse_address,
    worker_key,
)

KEY = b"k" * 32
CONFIG = EngineConfig(model="some-model", tensor_parallel_size=4, local_ranks=2, worker_address="127.0.0.1:0")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY.decode())


class Waiting:
    """`await_ranks` in a thread of its own, and what came of it."""

    def __init__(self, missing: int, wait_s: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.ranks: list[Rank] = []
        self.error: Exception | None = None
        self._config = dataclasses.replace(CONFIG, worker_address=self.address)
        self._thread = threading.Thread(target=self._wait, args=(missing, wait_s))
        self._thread.start()

    def _wait(self, missing: int, wait_s: float) -> None:
        try:
            self.ranks = await_ranks(self._config, missing, wait_s=wait_s)
        except ConfigError as error:
            self.error = error

    def offer(self, machine: str, slot: int, key: bytes = KEY) -> Joining:
        deadline = time.monotonic() + 5
        while True:
            try:
                return join(self.address, key, machine, slot)
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def outcome(self) -> list[Rank]:
        self._thread.join(10)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.ranks


@contextlib.contextmanager
def waiting(missing: int, wait_s: float = 5.0) -> Iterator[Waiting]:
    running = Waiting(missing, wait_s)
    try:
        yield running
    finally:
        with contextlib.suppress(ConfigError):
            for rank in running.outcome():
                rank.end()


def test_ranks_join_machine_by_machine_and_learn_the_settings() -> None:
    with waiting(3) as engine:
        offers = [engine.offer(machine, slot) for machine, slot in (("far", 0), ("near", 0), ("far", 1))]
        for offer in offers:
            assert offer.settings.model == "some-model"
            offer.joined()
        ranks = engine.outcome()
        places = [(rank.host, rank.local_rank) for rank in ranks]
        far, near = [("far (127.0.0.1)", 0), ("far (127.0.0.1)", 1)], [("near (127.0.0.1)", 0)]
        assert places in (far + near, near + far)
        assert {rank.address for rank in ranks} == {"127.0.0.1"}
        # The connection goes on as that of a rank.
        ranks[0].frames.send(b"hello")
        first = next(offer for offer in offers if offer.sock.getsockname() == ranks[0].frames.socket.getpeername())
        assert FrameSocket(first.sock, 100).receive() == b"hello"
        for offer in offers:
            offer.sock.close()


def test_a_wrong_key_is_an_error_on_one_side_and_a_line_on_the_other(caplog: pytest.LogCaptureFixture) -> None:
    with waiting(1, wait_s=1.0) as engine:
        with pytest.raises(ConfigError, match=f"another {KEY_VARIABLE}"):
            engine.offer("far", 0, key=b"x" * 32)
        with pytest.raises(ConfigError, match="0 of 1 ranks of other machines have joined within 1 s"):
            engine.outcome()
    assert f"a worker at 127.0.0.1 did not join: it has another {KEY_VARIABLE}" in caplog.text


def test_an_engine_that_does_not_know_the_key_gets_no_rank() -> None:
    """A listener that sends a challenge and then settings without a proof."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            sock, _ = listener.accept()
            frames = FrameSocket(sock, 65536)
            frames.send(msgspec.msgpack.encode({"type": "challenge", "nonce": b"n" * 32}))
            assert frames.receive()
            settings = dataclasses.asdict(CONFIG)
            frames.send(msgspec.msgpack.encode({"type": "welcome", "mac": b"m" * 32, "settings": settings}))
            frames.receive()
            sock.close()

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(ConfigError, match="is not your engine"):
            join(f"127.0.0.1:{listener.getsockname()[1]}", KEY, "far", 0)
        thread.join(5)


def test_a_worker_without_the_model_ends_the_wait_with_its_reason() -> None:
    with waiting(1) as engine:
        engine.offer("far", 0).cannot_join("There is no model some-model.")
        with pytest.raises(ConfigError, match=r"far \(127\.0\.0\.1\) cannot join: There is no model some-model\."):
            engine.outcome()


def test_who_speaks_another_language_costs_nothing_but_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with waiting(1) as engine:
        engine_address = parse_address(engine.address, "")
        for noise in (b"GET / HTTP/1.1\r\n\r\n", (2**31).to_bytes(4, "big"), b""):
            offer = engine.offer("probe", 9)
            offer.sock.close()
            with socket.create_connection(engine_address, timeout=5) as sock:
                sock.sendall(noise)
        offer = engine.offer("far", 0)
        offer.joined()
        assert [rank.host for rank in engine.outcome()] == ["far (127.0.0.1)"]
        offer.sock.close()
    assert caplog.text.count("did not join") >= 4


def test_a_rank_too_many_is_refused() -> None:
    """One joins while the answer of another is still open: the engine takes who says first that it is ready."""
    with waiting(1) as engine:
        first, second = engine.offer("a", 0), engine.offer("b", 0)
        second.joined()
        assert [rank.host for rank in engine.outcome()] == ["b (127.0.0.1)"]
        first.joined()
        assert FrameSocket(first.sock, 100).receive() is None
        for offer in (first, second):
            offer.sock.close()
        with pytest.raises((JoinRefusedError, OSError)):
            join(engine.address, KEY, "c", 0)


@pytest.mark.parametrize("value", ["", "short"])
def test_keys_that_can_be_guessed_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(ConfigError, match=f"{KEY_VARIABLE} must have at least 16 characters"):
        worker_key()


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:x", "host:70000"])
def test_addresses_are_checked(address: str) -> None:
    with pytest.raises(ConfigError, match="--join must be HOST:PORT"):
        parse_address(address, "--join")
    assert parse_address("[::1]:80", "--join") == ("::1", 80)


def test_an_address_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = dataclasses.replace(CONFIG, worker_address=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigError, match="cannot listen there"):
            await_ranks(config, 1)
