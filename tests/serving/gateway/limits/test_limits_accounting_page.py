"""Every row of "Limits" in docs/accounting.md is what the limiter counts."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.core.errors import RateLimitError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.identity import Identity, RateLimits
from penstock.serving.gateway.limits.interface import LimitStore
from penstock.serving.gateway.limits.limiter import Limiter, Ticket
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.limits.limit_clock import Clock

PAGE = Path(__file__).resolve().parents[4] / "docs" / "accounting.md"
RPM, TPM, SLOTS = 100, 1000, 2
WHO = Identity(tenant="acme", key_id="k", method="key", key_limits=RateLimits(RPM, TPM, SLOTS))

PROMPT_ESTIMATE, OUTPUT_RESERVATION, PROMPT, OUTPUT = 30, 50, 21, 8
# What the words of the table are in numbers.
TOKENS = {
    "0": 0,
    "prompt estimate + output reservation": PROMPT_ESTIMATE + OUTPUT_RESERVATION,
    "prompt + output": PROMPT + OUTPUT,
    "prompt + output made until the engine stopped": PROMPT + OUTPUT,
    "each token once": PROMPT + OUTPUT,
}
HELD = {"from admission to the end", "while it is sent", "until the answer", "until the engine stopped"}
# What the gateway asks of the limiter: reserved at admission (None: not asked), settled at the end.
FULL = (PROMPT_ESTIMATE, OUTPUT_RESERVATION)
ACTIONS: dict[str, tuple[tuple[int, int] | None, tuple[int, int]]] = {
    "miss": (FULL, (PROMPT, OUTPUT)),
    "bypass": (FULL, (PROMPT, OUTPUT)),
    "hit": ((0, 0), (0, 0)),
    "coalesced": (FULL, (0, 0)),
    "rejected by a limit": (None, (0, 0)),
    "rejected by admission (503)": (FULL, (0, 0)),
    "invalid (400) found before admission": (None, (0, 0)),
    "invalid (400) found by the engine's frontend": (FULL, (0, 0)),
    "cancelled by the client or by its deadline": (FULL, (PROMPT, OUTPUT)),
    "failed (5xx)": (FULL, (0, 0)),
    "resumed after a crash of the engine": (FULL, (PROMPT, OUTPUT)),
}


def page_rows() -> list[list[str]]:
    """The cells of the table."""
    section = PAGE.read_text().partition("## Limits\n")[2].partition("\n## ")[0]
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), section.strip().splitlines()))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_row_has_an_action() -> None:
    assert {row[0] for row in page_rows()} == set(ACTIONS)


@pytest.fixture
async def limiter(store: LimitStore, clock: Clock) -> AsyncIterator[Limiter]:
    limiter = Limiter(store, GatewayConfig(), Recorder(), clock)
    yield limiter
    await limiter.close()


async def state(limiter: Limiter, probe: str) -> tuple[int, int, int]:
    """Requests, tokens and slots in use, beside those of the probes themselves."""
    tickets: list[Ticket] = []
    try:
        while True:
            tickets.append(await limiter.admit(WHO, f"{probe}-{len(tickets)}", 0, 0))
    except RateLimitError as error:
        requests = RPM - int(error.headers[b"x-ratelimit-remaining-requests"]) - len(tickets)
        tokens = TPM - int(error.headers[b"x-ratelimit-remaining-tokens"])
    for ticket in tickets:
        ticket.cancel()
    await limiter.flush()
    return requests, tokens, SLOTS - len(tickets)


@pytest.mark.parametrize("row", page_rows(), ids=lambda row: row[0])
async def test_row(limiter: Limiter, row: list[str]) -> None:
    outcome, requests, reserved, settled, concurrency = row
    if requests == "as if nothing had happened":
        requests, reserved, concurrency = "1", "prompt estimate + output reservation", "from admission to the end"
    reservation, used = ACTIONS[outcome]
    ticket: Ticket | None = None
    other = await limiter.admit(WHO, "another request", 0, 1)
    if outcome == "rejected by a limit":
        with pytest.raises(RateLimitError):
            await limiter.admit(WHO, "r", 0, TPM)
    elif reservation is not None:
        ticket = await limiter.admit(WHO, "r", *reservation)
    other.settle(0, 0)
    await limiter.flush()

    held = concurrency in HELD
    assert held or concurrency == "0"
    during = await state(limiter, "during")
    assert during == (1 + int(requests), TOKENS[reserved], int(held))

    probes = SLOTS - int(held)
    if ticket is not None:
        ticket.settle(*used)
        await limiter.flush()
    after = await state(limiter, "after")
    assert after == (1 + int(requests) + probes, TOKENS[settled], 0)
