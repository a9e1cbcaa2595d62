"""One of several processes that share limits: many clients ask as fast as they can, and what they saw is printed as JSON.

Arguments: URL of Redis, number of clients, seconds, length of the window in seconds, limit, slots.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time

from penstock.serving.gateway.limits.interface import Reservation, Subject
from penstock.serving.gateway.limits.redis_store import RedisLimitStore
from penstock.serving.gateway.stores.redis_link import RedisLink
from penstock.telemetry.recorder import Recorder

TOKENS = 5


async def client(
    store: RedisLimitStore, subject: Subject, name: str, until: float, seen: dict[str, list[list[float]]]
) -> None:
    """Ask until the time is over. Notes when it was admitted (between two times) and how long it surely held its slot."""
    number = 0
    while time.monotonic() < until:
        number += 1
        reservation = Reservation(f"{name}-{number}", "acme", [subject], TOKENS)
        before = time.monotonic()
        verdict = await store.admit(reservation)
        after = time.monotonic()
        if verdict.allowed:
            seen["admitted"].append([before, after])
            await asyncio.sleep(random.random() * 0.05)
            seen["held"].append([after, time.monotonic()])
            await store.settle(reservation, TOKENS)
        else:
            seen["refused"].append([before, after])
            await asyncio.sleep(0.05 + random.random() * 0.05)


async def main(url: str, clients: int, seconds: float, window_s: float, limit: int, slots: int) -> None:
    link = RedisLink(url, Recorder(), timeout_s=30)
    store = RedisLimitStore(link, window_s=window_s)
    subject = Subject("key:shared", limit, limit * TOKENS, slots)
    seen: dict[str, list[list[float]]] = {"admitted": [], "held": [], "refused": []}
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(store, subject, f"{os.getpid()}-{n}", until, seen) for n in range(clients)))
    await link.close()
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    _, url, clients, seconds, window, limit, slots = sys.argv
    asyncio.run(main(url, int(clients), float(seconds), float(window), int(limit), int(slots)))
