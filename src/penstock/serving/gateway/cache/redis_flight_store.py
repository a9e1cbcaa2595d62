"""The logs of shared generations in Redis, for gateway processes on any number of machines.

    penstock:rc:{KEY}:owner   who leads; expires with the claim
    penstock:rc:{KEY}:log     list of chunks, each behind one byte: "." or, for the last one, "!"

Every operation is one script, so a claim that is lost in between changes nothing. A reader that waits asks again and again, ever less
often: a blocking read would take a connection of the pool for every request that follows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from penstock.serving.gateway.cache.interface import Log
from penstock.serving.gateway.stores.redis_link import RedisLink

if TYPE_CHECKING:
    from redis.asyncio import Redis

PURPOSE = "flight"
_FIRST_POLL_S = 0.005
_LONGEST_POLL_S = 0.04
_MAX_CHUNKS_PER_READ = 256
# A log that has not ended goes some time after its owner's claim.
_LOG_LEASES = 2

_CLAIM = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  redis.call('DEL', KEYS[2])
  return 1
end
return 0
"""
_APPEND = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if #ARGV[4] > 0 then redis.call('RPUSH', KEYS[2], '.' .. ARGV[4]) end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""
_FINISH = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('RPUSH', KEYS[2], '!' .. ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('DEL', KEYS[1])
return 1
"""
_ABANDON = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
return 1
"""
_READ = """
local first = tonumber(ARGV[1])
local chunks = redis.call('LRANGE', KEYS[2], first, first + tonumber(ARGV[2]) - 1)
return {redis.call('EXISTS', KEYS[1]), redis.call('LLEN', KEYS[2]), redis.call('LINDEX', KEYS[2], -1) or '', chunks}
"""


class RedisFlightStore:
    """A FlightStore. Every method raises StoreUnavailableError while Redis is away. Does not own the link."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        # redis-py sends a script's hash, and the script only to a server that does not know it.
        scripts = (_CLAIM, _APPEND, _FINISH, _ABANDON, _READ)
        self._scripts = {script: link.redis.register_script(script) for script in scripts}

    async def claim(self, key: str, owner: str, lease_s: float) -> bool:
        return bool(await self._run(_CLAIM, key, owner, _milliseconds(lease_s)))

    async def append(self, key: str, owner: str, chunk: bytes, lease_s: float) -> bool:
        lease, log_lease = _milliseconds(lease_s), _milliseconds(lease_s * _LOG_LEASES)
        return bool(await self._run(_APPEND, key, owner, lease, log_lease, chunk))

    async def finish(self, key: str, owner: str, chunk: bytes, keep_s: float) -> None:
        await self._run(_FINISH, key, owner, _milliseconds(keep_s), chunk)

    async def abandon(self, key: str, owner: str) -> None:
        await self._run(_ABANDON, key, owner)

    async def read(self, key: str, position: int, wait_s: float) -> Log:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        pause_s = _FIRST_POLL_S
        while True:
            claimed, length, last, chunks = await self._run(_READ, key, position, _MAX_CHUNKS_PER_READ)
            log = _log(bool(claimed), position + len(chunks) < length, last, chunks)
            left_s = deadline - loop.time()
            if log.chunks or log.state != "running" or left_s <= 0:
                return log
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, _LONGEST_POLL_S)

    async def close(self) -> None: ...

    async def _run(self, script: str, key: str, *args: bytes | float | str) -> Any:
        async def run(redis: Redis) -> Any:
            return await self._scripts[script](keys=_keys(key), args=cast("Sequence[Any]", args), client=redis)

        return await self._link.call(run, PURPOSE)


def _keys(key: str) -> list[str]:
    """The braces keep both on one node of a cluster."""
    return [f"penstock:rc:{{{key}}}:owner", f"penstock:rc:{{{key}}}:log"]


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _log(claimed: bool, more: bool, last: bytes, chunks: list[bytes]) -> Log:
    found = [chunk[1:] for chunk in chunks]
    if claimed or more:
        return Log(found, "running")
    return Log(found, "finished" if last.startswith(b"!") else "gone")
