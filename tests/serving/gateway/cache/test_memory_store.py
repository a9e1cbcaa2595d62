"""Answers in memory: a bound in bytes, the least recently used go first, nothing outlives its time."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.serving.frontend.client import Delta, TokenLogprob, TopLogprob
from penstock.serving.gateway.cache.interface import Entry
from penstock.serving.gateway.cache.memory_store import MemoryStore, entry_size
from penstock.telemetry import metrics
from penstock.telemetry.recorder import Recorder


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.5

    def __call__(self) -> float:
        return self.now


def make_entry(text: str = "answer", tokens: int = 3, top: int | None = None, prompt: int = 0) -> Entry:
    logprobs = None
    if top is not None:
        logprobs = [
            TokenLogprob(
                300 + token,
                f"token {token}",
                b"token %d" % token,
                -0.5 - token,
                tuple(TopLogprob(400 + n, f"other {token} {n}", b"%d" % n, -1.5 - n) for n in range(top)),
            )
            for token in range(tokens)
        ]
    ids = [1000 + token for token in range(tokens)]
    prompt_ids = [2000 + token for token in range(prompt)]
    delta = Delta(0, text, ids, 0, tokens, prompt, prompt, logprobs, prompt_ids, None, "stop", "END" * 3)
    return Entry(1.0, [(0, delta)])


def make_store(entries: float = 100.0, clock: Clock | None = None) -> tuple[MemoryStore, Recorder, Clock]:
    """Room for about `entries` of the default entry."""
    recorder, clock = Recorder(), clock or Clock()
    return MemoryStore(int(entries * entry_size(make_entry())), recorder, clock=clock), recorder, clock


async def test_an_answer_is_the_same_object_until_its_time_is_over() -> None:
    store, recorder, clock = make_store()
    entry = make_entry()
    await store.put("k", entry, 10.0)
    assert await store.get("k") is entry
    assert await store.get("other") is None
    clock.now += 9.99
    assert store.peek("k") is entry
    clock.now += 0.01
    assert await store.get("k") is None
    assert (len(store), store.size) == (0, 0)
    assert recorder.value(metrics.CACHE_EVICTIONS, "expired") == 1
    await store.close()


async def test_the_least_recently_used_goes_first() -> None:
    store, recorder, _ = make_store(entries=20)
    for number in range(20):
        store.put_nowait(str(number), make_entry(), 10.0)
    assert len(store) == 20
    assert store.peek("0") is not None
    store.put_nowait("new", make_entry(), 10.0)
    assert store.peek("1") is None
    assert store.peek("0") is not None
    assert recorder.value(metrics.CACHE_EVICTIONS, "size") == 1
    assert recorder.value(metrics.CACHE_ENTRIES) == 20
    assert recorder.value(metrics.CACHE_BYTES) == store.size == 20 * entry_size(make_entry())
    await store.close()


async def test_an_answer_above_an_eighth_of_the_bound_is_not_kept_and_replaces_nothing_else() -> None:
    store, _, _ = make_store(entries=8)
    store.put_nowait("small", make_entry(), 10.0)
    store.put_nowait("large", make_entry(text="x" * entry_size(make_entry())), 10.0)
    assert store.peek("large") is None
    assert store.peek("small") is not None
    # What is there under the same key is older than the answer that could not be kept.
    store.put_nowait("small", make_entry(tokens=1000), 10.0)
    assert store.peek("small") is None
    await store.close()


async def test_a_new_answer_replaces_the_old_one_and_its_time() -> None:
    store, recorder, clock = make_store()
    store.put_nowait("k", make_entry(text="old"), 10.0)
    clock.now += 5
    newer = make_entry(text="newer, and longer")
    store.put_nowait("k", newer, 10.0)
    assert store.size == entry_size(newer)
    clock.now += 6
    store.expire()
    assert store.peek("k") is newer
    assert recorder.value(metrics.CACHE_EVICTIONS, "expired") == 0
    await store.close()


async def test_what_is_over_goes_without_being_asked_for() -> None:
    store, recorder, clock = make_store()
    for ttl_s in (1.0, 2.0, 2.5, 60.0):
        store.put_nowait(f"{ttl_s}", make_entry(), ttl_s)
    clock.now += 1.5
    store.expire()
    assert len(store) == 3
    clock.now += 30
    store.expire()
    assert len(store) == 1
    clock.now += 1e7
    store.expire()
    assert (len(store), store.size) == (0, 0)
    assert recorder.value(metrics.CACHE_EVICTIONS, "expired") == 4
    await store.close()


async def test_a_timer_takes_what_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.serving.gateway.cache.memory_store._SWEEP_INTERVAL_S", 0.001)
    store, _, clock = make_store()
    store.put_nowait("k", make_entry(), 1.0)
    clock.now += 5
    async with asyncio.timeout(20):
        while len(store):  # noqa: ASYNC110  # what it waits for is no event
            await asyncio.sleep(0.001)
    # And again after it has been empty for long.
    clock.now += 1e6
    store.put_nowait("k", make_entry(), 1.0)
    assert store.peek("k") is not None
    clock.now += 5
    async with asyncio.timeout(20):
        while len(store):  # noqa: ASYNC110  # what it waits for is no event
            await asyncio.sleep(0.001)
    await store.close()


async def test_no_room_and_no_time_keep_nothing() -> None:
    store = MemoryStore(0, Recorder())
    store.put_nowait("k", make_entry(), 10.0)
    assert store.peek("k") is None
    store, _, _ = make_store()
    store.put_nowait("k", make_entry(), 0.0)
    assert store.peek("k") is None
    await store.close()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "wait"]),
            st.integers(0, 12),
            st.floats(0.01, 20, allow_nan=False),
            st.integers(0, 30),
        ),
        max_size=60,
    )
)
def test_the_books_agree_after_any_sequence(operations: list[tuple[str, int, float, int]]) -> None:
    async def run() -> None:
        store, recorder, clock = make_store(entries=8)
        bound = int(8 * entry_size(make_entry()))
        kept: dict[str, tuple[Entry, float]] = {}
        for action, number, seconds, tokens in operations:
            key = str(number)
            if action == "wait":
                clock.now += seconds
            elif action == "put":
                entry = make_entry(tokens=tokens)
                store.put_nowait(key, entry, seconds)
                kept[key] = (entry, clock.now + seconds)
            elif (found := store.peek(key)) is not None:
                assert found is kept[key][0]
                assert clock.now < kept[key][1]
            slots = store._slots
            assert store.size == sum(slot.size for slot in slots.values()) <= bound
            assert sum(len(keys) for keys in store._expiring.values()) == len(slots)
            assert recorder.value(metrics.CACHE_BYTES) == store.size
        clock.now += 100
        store.expire()
        assert len(store) == len(store._expiring) == 0
        await store.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "tokens", "top", "prompt"),
    [("a" * 10, 2, None, 5), ("é" * 5000, 1000, None, 2000), ("a" * 4000, 1000, 0, 10), ("a" * 400, 100, 20, 10)],
)
def test_the_estimate_is_never_below_the_memory_that_an_entry_takes(
    text: str, tokens: int, top: int | None, prompt: int
) -> None:
    copies = 5
    make_entry(text, tokens, top, prompt)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        # `encode().decode()`: a string of its own for every entry.
        entries = [make_entry(text.encode().decode(), tokens, top, prompt) for _ in range(copies)]
        taken = (tracemalloc.get_traced_memory()[0] - before) / copies
    finally:
        tracemalloc.stop()
    assert taken <= entry_size(entries[0]) <= 4 * taken + 1500
