"""Failed attempts: from when on a client waits, for how long, whom it concerns, and that the memory of it is bounded."""

from __future__ import annotations

import pytest

from penstock.core.errors import AuthenticationError, RateLimitError
from penstock.serving.gateway.accounts.keys import new_key
from penstock.serving.gateway.security.addresses import client_block
from penstock.serving.gateway.security.authenticator import Authenticator
from penstock.serving.gateway.security.throttle import (
    FAILURES_PER_ADDRESS,
    FAILURES_PER_CREDENTIAL,
    WINDOW_S,
    FailureThrottle,
)
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.security.asgi_client import MemoryDirectory, Secured, ask, bearer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Door:
    """An authenticator with a clock of its own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.directory = MemoryDirectory()
        self.authenticator = Authenticator(self.directory, None, FailureThrottle(clock=self.clock), Recorder())

    async def knock(self, token: str, address: str = "192.0.2.1") -> int:
        """The status of one attempt."""
        try:
            await self.authenticator.require({"type": "http", "client": (address, 1), "headers": bearer(token)})
        except (AuthenticationError, RateLimitError) as error:
            return error.status
        return 200


async def test_an_address_that_fails_too_often_waits_exactly_as_long_as_it_is_told() -> None:
    door = Door()
    good = door.directory.add()
    for _ in range(FAILURES_PER_ADDRESS):
        assert await door.knock(new_key().token) == 401
        door.clock.now += 0.5
    finds = door.directory.finds
    assert await door.knock(good) == 429
    assert door.directory.finds == finds
    scope = {"type": "http", "client": ("192.0.2.1", 1), "headers": bearer(good)}
    with pytest.raises(RateLimitError) as caught:
        await door.authenticator.require(scope)
    # The first failure was half a second per attempt ago.
    wait_s = caught.value.retry_after_s
    assert wait_s == WINDOW_S - FAILURES_PER_ADDRESS * 0.5
    assert wait_s is not None
    door.clock.now += wait_s - 0.001
    assert await door.knock(good) == 429
    door.clock.now += 0.001
    assert await door.knock(good) == 200


async def test_a_valid_key_works_from_elsewhere_while_an_attacker_waits() -> None:
    door = Door()
    good = door.directory.add()
    wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
    for _ in range(FAILURES_PER_ADDRESS * 2):
        await door.knock(wrong, "198.51.100.1")
    assert await door.knock(wrong, "198.51.100.1") == 429
    assert await door.knock(good, "192.0.2.1") == 200
    assert await door.knock(good, "198.51.100.2") == 200


async def test_one_broken_program_does_not_lock_out_its_neighbours() -> None:
    """Everybody behind one NAT has one address; the program repeats a revoked key."""
    door = Door()
    good, revoked = door.directory.add(), door.directory.add(usable=False)
    statuses = [await door.knock(revoked) for _ in range(500)]
    assert statuses.count(401) == FAILURES_PER_CREDENTIAL
    assert await door.knock(good) == 200


async def test_a_success_changes_nothing_for_the_failures() -> None:
    door = Door()
    good = door.directory.add()
    for _ in range(FAILURES_PER_ADDRESS):
        assert await door.knock(new_key().token) == 401
        if _ < FAILURES_PER_ADDRESS - 1:
            assert await door.knock(good) == 200
    assert await door.knock(new_key().token) == 429


async def test_an_attacker_gets_no_more_attempts_than_the_limit_in_any_minute() -> None:
    door = Door()
    looked_at: list[float] = []
    for _ in range(3000):
        if await door.knock(new_key().token) == 401:
            looked_at.append(door.clock.now)
        door.clock.now += 0.1
    assert len(looked_at) == FAILURES_PER_ADDRESS * 5
    for index in range(len(looked_at) - FAILURES_PER_ADDRESS):
        assert looked_at[index + FAILURES_PER_ADDRESS] - looked_at[index] >= WINDOW_S - 1e-6


async def test_requests_without_a_credential_or_with_a_malformed_one_are_no_attempts() -> None:
    secured = Secured(auth="keys")
    token = secured.directory.add()
    for _ in range(FAILURES_PER_ADDRESS * 2):
        assert (await ask(secured.app, "/v1/models")).status == 401
        assert (await ask(secured.app, "/v1/models", bearer(token) * 2)).status == 401
    assert (await secured.get("/v1/models", token)).status == 200


async def test_the_refusal_says_when_and_nothing_else() -> None:
    secured = Secured(auth="keys")
    for _ in range(FAILURES_PER_CREDENTIAL):
        await secured.get("/v1/models", "psk_wrong")
    answer = await secured.get("/v1/models", "psk_wrong")
    assert (answer.status, answer.code) == (429, "too_many_failed_attempts")
    assert 55 <= int(answer.headers["retry-after"]) <= 60
    assert 55_000 < int(answer.headers["retry-after-ms"]) <= 60_000
    assert secured.failures("throttled") == 1
    assert (await secured.get("/health")).status == 200


def test_clients_without_an_address_share_nothing() -> None:
    throttle = FailureThrottle()
    for _ in range(1000):
        throttle.failed(None, "id")
    assert throttle.wait_s(None, "id") == 0
    assert throttle.remembered == 0


def test_the_memory_is_bounded_and_forgets_the_oldest_first() -> None:
    throttle = FailureThrottle(per_address=2, per_credential=1, max_addresses=100, max_credentials=200, clock=Clock())
    for _ in range(2):
        throttle.failed("attacker", "id")
    for number in range(10_000):
        throttle.failed(f"10.0.{number % 251}.{number // 251}", number)
        if number % 50 == 0:
            throttle.failed("attacker", number)
    assert throttle.remembered <= 300
    assert throttle.wait_s("attacker", "id") > 0
    assert throttle.wait_s("10.0.1.0", "other") == 0


def test_whoever_failed_last_is_remembered_longest() -> None:
    throttle = FailureThrottle(per_address=2, max_addresses=3, clock=Clock())
    for address in ("a", "a", "b", "c", "a", "d"):
        throttle.failed(address, object())
    assert throttle.wait_s("a", "x") > 0
    throttle.failed("b", "x")
    assert throttle.wait_s("b", "y") == 0


@pytest.mark.parametrize(
    ("host", "block"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_customer_has_one_count(host: str, block: str) -> None:
    assert client_block(host) == block
