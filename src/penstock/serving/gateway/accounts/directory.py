"""API keys as authentication sees them: read from the database at most twice a second and key, remembered in bounded tables.

    age of what is known   0 ─────────── 0.5 s ─────────── 1 s ─────────────────────────── 60 s
                           answer at once  │ answer at once, │ ask and wait; while the      │ ask and wait, else
                                           │ ask behind it   │ database is away, answer     │ StoreUnavailableError

So a revocation holds everywhere within a second and the time of one look-up, and a key in use never waits for the database. Only while the
database is away (an error, or no answer within the time-out) what is known may be up to 60 s old; a key that was seen revoked or
expired stays so. While it is away nobody waits for it: a probe asks twice a second whether it is back.

One query at a time reads all keys that are asked for meanwhile: many clients of one key cost one query, and a flood of made-up ids costs
long queries, not many. Unknown ids have a table of their own, so that made-up ids push no key out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from itertools import islice
from typing import Generic, TypeVar

import msgspec

from penstock.core.errors import StoreUnavailableError
from penstock.serving.gateway.accounts.database import Database, reason_of
from penstock.serving.gateway.accounts.interface import KeyEntry
from penstock.serving.gateway.accounts.key_queries import FoundKey, read_any_admin, read_keys
from penstock.serving.gateway.accounts.keys import is_key_id
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

T = TypeVar("T")
STORE = "database"
PURPOSE = "keys"
REFRESH_AFTER_S = 0.5
FRESH_S = 1.0
STALE_S = 60.0
KNOWN_KEYS = 16_384
UNKNOWN_KEYS = 4_096
LOOKUP_TIMEOUT_S = 2.0
PROBE_INTERVAL_S = 0.5
_BATCH_KEYS = 500


class _Answer(msgspec.Struct, Generic[T]):
    """What the database said when it was asked at `at` (monotonic)."""

    value: T
    at: float


class _BoundedTable(Generic[T]):
    """The `size` most recently used answers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: OrderedDict[str, _Answer[T]] = OrderedDict()

    def use(self, key: str) -> _Answer[T] | None:
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: str, answer: _Answer[T]) -> None:
        self._answers[key] = answer
        self._answers.move_to_end(key)
        if len(self._answers) > self._size:
            self._answers.popitem(last=False)

    def remove(self, key: str) -> None:
        self._answers.pop(key, None)

    def __len__(self) -> int:
        return len(self._answers)


class AccountDirectory:
    """A KeyDirectory over the database. Used from one event loop. `close` ends what runs behind requests; the database is the caller's."""

    def __init__(
        self,
        database: Database,
        recorder: Recorder,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
        known_keys: int = KNOWN_KEYS,
        unknown_keys: int = UNKNOWN_KEYS,
    ) -> None:
        self._database = database
        self._recorder = recorder
        self._clock = clock
        self._wall_clock = wall_clock
        self._lookup_timeout_s = lookup_timeout_s
        self._known: _BoundedTable[FoundKey] = _BoundedTable(known_keys)
        self._unknown: _BoundedTable[None] = _BoundedTable(unknown_keys)
        self._admin: _Answer[bool] | None = None
        # Keys that somebody waits for and that no query has read yet.
        self._asked: dict[str, asyncio.Future[FoundKey | None]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._probe: asyncio.Task[None] | None = None
        recorder.set(metrics.STORE_UP, 1, STORE)

    @property
    def remembered(self) -> tuple[int, int]:
        """How many known and unknown ids are in memory."""
        return len(self._known), len(self._unknown)

    async def find(self, key_id: str) -> KeyEntry | None:
        """See KeyDirectory."""
        if not is_key_id(key_id):
            return None
        answer = self._recall(key_id)
        age = float("inf") if answer is None else self._clock() - answer.at
        found = None if answer is None else answer.value
        if age >= FRESH_S:
            try:
                found = await self._ask(key_id)
            except StoreUnavailableError:
                if age >= STALE_S:
                    self._recorder.increment(metrics.STORE_ERRORS, STORE, PURPOSE)
                    raise
        elif age >= REFRESH_AFTER_S and self._probe is None:
            self._enqueue(key_id)
        return None if found is None else found.at(self._wall_clock())

    async def any_admin(self) -> bool:
        """See KeyDirectory. While the database is away, what was known last; False when nothing is."""
        if self._admin is None or self._clock() - self._admin.at >= FRESH_S:
            try:
                await self._ask("")
            except StoreUnavailableError:
                self._recorder.increment(metrics.STORE_ERRORS, STORE, PURPOSE)
        return self._admin is not None and self._admin.value

    async def close(self) -> None:
        """End look-ups that run. Idempotent."""
        tasks = [task for task in (self._reader, self._probe) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail_all()

    def _recall(self, key_id: str) -> _Answer[FoundKey] | _Answer[None] | None:
        return self._known.use(key_id) or self._unknown.use(key_id)

    async def _ask(self, name: str) -> FoundKey | None:
        """What the database says of a key ("": of admin keys, into `_admin`). Raises StoreUnavailableError."""
        if self._probe is not None:
            raise _unavailable()
        # Shielded: others may wait for the same look-up.
        return await asyncio.shield(self._enqueue(name))

    def _enqueue(self, name: str) -> asyncio.Future[FoundKey | None]:
        future = self._asked.get(name)
        if future is None:
            future = self._asked[name] = asyncio.get_running_loop().create_future()
            # A refresh that nobody waits for may fail without a word: the reader logs.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            if self._reader is None:
                self._reader = asyncio.create_task(self._read_all())
        return future

    async def _read_all(self) -> None:
        """Read what is asked for, batch by batch, until nothing is."""
        try:
            while self._asked:
                names = list(islice(self._asked, _BATCH_KEYS))
                try:
                    found = await self._read(names)
                except StoreUnavailableError as error:
                    self._away(reason_of(error))
                    self._fail_all()
                except Exception as error:
                    # A fault of ours: those who wait get it, the next ones get another try.
                    logger.error("looking up keys failed unexpectedly", exc_info=error)
                    for name in names:
                        _fail(self._asked.pop(name), error)
                else:
                    for name in names:
                        _answer(self._asked.pop(name), found.get(name))
        finally:
            self._reader = None

    async def _read(self, names: Collection[str]) -> dict[str, FoundKey]:
        """Read keys (and "" for admin keys) into memory. Takes the time-out at most, even where giving up a connection takes longer."""
        query = asyncio.create_task(self._query(names))
        try:
            done, _ = await asyncio.wait({query}, timeout=self._lookup_timeout_s)
        except asyncio.CancelledError:
            query.cancel()
            await asyncio.gather(query, return_exceptions=True)
            raise
        if not done:
            query.cancel()
            query.add_done_callback(lambda task: task.cancelled() or task.exception())
            error = _unavailable()
            error.add_note(f"{self._database.name}: no answer within {self._lookup_timeout_s:g} s")
            raise error
        return query.result()

    async def _query(self, names: Collection[str]) -> dict[str, FoundKey]:
        # What is read may be as old as the moment of asking.
        at, now = self._clock(), self._wall_clock()
        ids = [name for name in names if name]
        async with self._database.read() as connection:
            found = await read_keys(connection, ids, now) if ids else {}
            if len(ids) < len(names):
                self._admin = _Answer(await read_any_admin(connection, now), at)
        for key_id in ids:
            if key_id in found:
                self._known.put(key_id, _Answer(found[key_id], at))
                self._unknown.remove(key_id)
            else:
                self._unknown.put(key_id, _Answer(None, at))
                self._known.remove(key_id)
        return found

    def _fail_all(self) -> None:
        while self._asked:
            _fail(self._asked.popitem()[1], _unavailable())

    def _away(self, reason: str) -> None:
        if self._probe is None:
            logger.error("the account database is away; keys are taken from memory for up to %g s: %s", STALE_S, reason)
            self._recorder.set(metrics.STORE_UP, 0, STORE)
            self._probe = asyncio.create_task(self._probe_until_back())

    async def _probe_until_back(self) -> None:
        away = True
        while away:
            await asyncio.sleep(PROBE_INTERVAL_S)
            try:
                await self._read([""])
            except StoreUnavailableError:
                continue
            except Exception as error:
                # It answers, if with an error: look-ups shall show it.
                logger.error("probing the account database failed unexpectedly", exc_info=error)
            away = False
        self._probe = None
        self._recorder.set(metrics.STORE_UP, 1, STORE)
        logger.warning("the account database is back")


def _unavailable() -> StoreUnavailableError:
    return StoreUnavailableError("The account database is not available. Retry shortly.")


def _answer(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
