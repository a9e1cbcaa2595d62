"""Single flight among gateway processes: one generation, and no token doubled or lost when its leader goes."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from penstock.core.errors import EngineError, InvalidRequestError, OverloadedError, StoreUnavailableError
from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import GenerationRequest, TextPrompt
from penstock.serving.gateway.cache import flight_log
from penstock.serving.gateway.cache.flights import Flight
from penstock.serving.gateway.cache.interface import Entry, FlightStore, Log
from penstock.serving.gateway.cache.local_flight_store import LocalFlightStore
from penstock.serving.gateway.cache.replay import join
from penstock.serving.gateway.cache.shared_flights import SharedFlights
from penstock.serving.gateway.cache.subscription import Subscription
from penstock.serving.gateway.results import News
from penstock.serving.gateway.streaming.delta_stream import DeltaStream
from penstock.testing.fake_client import Behavior, FakeClient

Stores = Callable[[], FlightStore]
_numbers: Iterator[int] = itertools.count()


class MortalStore:
    """A FlightStore that a test can take away: what a killed process does not say any more, what a broken network does not carry."""

    def __init__(self, store: FlightStore) -> None:
        self.store = store
        self.away = False

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailableError("away")

    async def claim(self, key: str, owner: str, lease_s: float) -> bool:
        self._check()
        return await self.store.claim(key, owner, lease_s)

    async def append(self, key: str, owner: str, chunk: bytes, lease_s: float) -> bool:
        self._check()
        return await self.store.append(key, owner, chunk, lease_s)

    async def finish(self, key: str, owner: str, chunk: bytes, keep_s: float) -> None:
        self._check()
        await self.store.finish(key, owner, chunk, keep_s)

    async def abandon(self, key: str, owner: str) -> None:
        self._check()
        await self.store.abandon(key, owner)

    async def read(self, key: str, position: int, wait_s: float) -> Log:
        self._check()
        return await self.store.read(key, position, wait_s)

    async def close(self) -> None: ...


@dataclass
class Reader:
    stream: Subscription
    promotions: list[str]
    news: list[News] = field(default_factory=list)

    async def read(self, most: int | None = None) -> list[News]:
        """One delta per choice, of what was read."""
        async with self.stream as stream:
            while await stream.wait(30) or not stream.ended:
                self.news += stream.take()
                if most is not None and len(self.news) >= most:
                    break
        return join(self.news)


class Process:
    """One gateway process: its flights and its way to the engine."""

    def __init__(self, store: FlightStore, kept: dict[str, Entry] | None = None, **behavior: object) -> None:
        self.store = MortalStore(store)
        self.flights = SharedFlights(self.store)
        self.client = FakeClient(Behavior(**{"interval_s": 0.002, **behavior}))  # type: ignore[arg-type]
        self.kept: dict[str, Entry] = {} if kept is None else kept
        self.writes = 0
        self.ends = 0

    def open(self, key: str = "k", *, tokens: int = 40, n: int = 2, fresh: bool = False) -> Flight:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, n=n, logprobs=1, prompt_logprobs=0)
        request = GenerationRequest(request_id=f"r{next(_numbers)}", prompt=TextPrompt("a€c"), sampling=sampling)

        async def keep(entry: Entry) -> None:
            self.writes += 1
            self.kept[key] = entry

        def end() -> None:
            self.ends += 1

        async def recheck() -> Entry | None:
            return self.kept.get(key)

        return self.flights.open(
            key,
            lambda on_delta: DeltaStream(self.client, [request], on_delta, float("inf")),
            end,
            keep,
            recheck=None if fresh else recheck,
        )

    def ask(self, key: str = "k") -> Reader:
        flight = self.flights.find(key) or self.open(key)
        promotions: list[str] = []
        return Reader(flight.subscribe(lambda prompt, delta: None, 30, lambda: promotions.append("leader")), promotions)

    async def die(self) -> None:
        """As kill -9: nobody hears of it."""
        self.store.away = True
        await self.flights.close()


async def led(reader: Reader) -> Reader:
    """After it is known whether the reader's process generates."""
    await reader.stream._flight.decided()
    return reader


def answer(news: list[News]) -> list[News]:
    """Without what only the leader sees."""
    return [
        (prompt, replace(delta, num_cached_tokens=0, queue_time_s=None, prompt_token_ids=None, prompt_logprobs=None))
        for prompt, delta in news
    ]


async def expected() -> list[News]:
    """The whole answer, from one process alone."""
    return answer(await Process(LocalFlightStore()).ask().read())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # what it waits for is no event
            await asyncio.sleep(0.001)


async def test_processes_share_one_generation(flight_stores: Stores) -> None:
    processes = [Process(flight_stores()) for _ in range(3)]
    readers = [process.ask() for process in processes for _ in range(4)]
    answers = await asyncio.gather(*[reader.read() for reader in readers])
    whole = await expected()
    assert all(answer(news) == whole for news in answers)
    assert sum(len(process.client.requests) for process in processes) == 1
    assert [reader.stream.role for reader in readers].count("leader") == 1
    assert all(reader.promotions == [] for reader in readers)
    for process in processes:
        await process.flights.close()
    # Whoever generates keeps the answer; the others' followers only read it.
    assert sum(process.writes for process in processes) == 1
    assert [process.ends for process in processes] == [1, 1, 1]


async def test_prompt_facts_and_usage_reach_followers_elsewhere(flight_stores: Stores) -> None:
    first = Process(flight_stores(), num_cached_tokens=1)
    leader = await led(first.ask())
    second = Process(flight_stores())
    follower = await led(second.ask())
    assert (leader.stream.role, follower.stream.role) == ("leader", "follower")
    ours, theirs = await asyncio.gather(leader.read(), follower.read())
    assert theirs[0][1].prompt_token_ids == ours[0][1].prompt_token_ids is not None
    assert theirs[0][1].prompt_logprobs == ours[0][1].prompt_logprobs is not None
    assert theirs[0][1].num_cached_tokens == theirs[0][1].num_prompt_tokens
    assert ours[0][1].num_cached_tokens == 1
    assert second.client.requests == []
    for process in (first, second):
        await process.flights.close()


async def test_others_go_on_when_the_leaders_process_has_no_reader_left(flight_stores: Stores) -> None:
    first = Process(flight_stores())
    leader = await led(first.ask())
    second = Process(flight_stores())
    follower = await led(second.ask())
    reading = asyncio.create_task(follower.read())
    reads = asyncio.create_task(leader.read(most=100))
    await until(lambda: len(follower.news) >= 10)
    reads.cancel()
    await asyncio.wait({reads})
    assert answer(await reading) == await expected()
    assert first.client.closed_early
    assert follower.promotions == ["leader"]
    assert follower.stream.role == "leader"
    assert (first.writes, second.writes) == (0, 1)
    await second.flights.close()


async def test_followers_elsewhere_continue_a_dead_leaders_answer(
    flight_stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight_log, "CLAIM_S", 0.5)
    monkeypatch.setattr(flight_log, "READ_WAIT_S", 0.2)
    first = Process(flight_stores(), interval_s=0.02)
    leader = await led(first.ask())
    # The third reads the log with other positions when it is written anew.
    second, third = Process(flight_stores(), tokens_per_delta=3), Process(flight_stores(), tokens_per_delta=7)
    followers = [await led(process.ask()) for process in (second, third, third)]
    reads = [asyncio.create_task(reader.read()) for reader in (leader, *followers)]
    await until(lambda: len(followers[-1].news) >= 12)
    await first.die()
    assert isinstance((await asyncio.gather(reads[0], return_exceptions=True))[0], OverloadedError)
    whole = await expected()
    for read in reads[1:]:
        assert answer(await read) == whole
    assert len(second.client.requests) + len(third.client.requests) == 1
    assert sum(len(reader.promotions) for reader in followers) == 1
    for process in (second, third):
        await process.flights.close()


async def test_a_generation_that_comes_out_differently_ends_with_an_error(flight_stores: Stores) -> None:
    first = Process(flight_stores())
    leader = await led(first.ask())
    second = Process(flight_stores(), reply="something else")
    follower = await led(second.ask())
    reading = asyncio.create_task(follower.read())
    await leader.read(most=10)
    with pytest.raises(EngineError) as caught:
        await reading
    assert caught.value.code == "generation_diverged"
    assert "".join(delta.text for prompt, delta in follower.news if delta.index == 0) in "a€c" * 40
    assert second.writes == 0


async def test_the_leaders_error_is_everybodys(flight_stores: Stores) -> None:
    error = InvalidRequestError("Too long.", param="messages", code="context_length_exceeded")
    first = Process(flight_stores(), error=error, error_after=20, interval_s=0.005)
    leader = await led(first.ask())
    second = Process(flight_stores())
    follower = await led(second.ask())
    results = await asyncio.gather(leader.read(), follower.read(), return_exceptions=True)
    for result in results:
        assert isinstance(result, InvalidRequestError)
        assert result.code == "context_length_exceeded"
    assert second.client.requests == []
    # The failure is nobody else's: the next request generates.
    first.client.behavior = Behavior()
    assert answer(await first.ask().read()) == await expected()


async def test_what_only_concerns_one_process_does_not_end_the_others(flight_stores: Stores) -> None:
    first = Process(flight_stores(), error=OverloadedError("shutting down"), error_after=20, interval_s=0.005)
    leader = await led(first.ask())
    second = Process(flight_stores())
    follower = await led(second.ask())
    results = await asyncio.gather(leader.read(), follower.read(), return_exceptions=True)
    assert isinstance(results[0], OverloadedError)
    assert not isinstance(results[1], BaseException)
    assert answer(results[1]) == await expected()
    await second.flights.close()


async def test_without_the_store_every_process_generates() -> None:
    store = LocalFlightStore()
    processes = [Process(store) for _ in range(2)]
    for process in processes:
        process.store.away = True
    readers = [process.ask() for process in processes]
    whole = await expected()
    assert [answer(news) for news in await asyncio.gather(*[reader.read() for reader in readers])] == [whole, whole]
    assert [len(process.client.requests) for process in processes] == [1, 1]
    assert [reader.stream.role for reader in readers] == ["leader", "leader"]
    assert [process.writes for process in processes] == [1, 1]


async def test_the_store_can_go_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_log, "READ_WAIT_S", 0.05)
    store = LocalFlightStore()
    first, second = Process(store), Process(store)
    leader, follower = await led(first.ask()), await led(second.ask())
    reads = [asyncio.create_task(reader.read()) for reader in (leader, follower)]
    await until(lambda: len(follower.news) >= 10)
    first.store.away = second.store.away = True
    whole = await expected()
    assert [answer(await read) for read in reads] == [whole, whole]
    assert (leader.promotions, follower.promotions) == ([], ["leader"])


async def test_a_leader_that_lost_its_claim_serves_its_readers() -> None:
    store = LocalFlightStore()
    first = Process(store)
    leader = await led(first.ask())
    reading = asyncio.create_task(leader.read())
    await until(lambda: len(leader.news) >= 10)
    await store.close()
    assert await store.claim("k", "somebody else", 30)
    assert answer(await reading) == await expected()
    # The other one's claim is untouched.
    assert not await store.claim("k", "third", 30)
    await first.flights.close()


async def test_an_answer_that_was_kept_in_the_meantime_is_not_made_again(flight_stores: Stores) -> None:
    kept: dict[str, Entry] = {}
    first, second = Process(flight_stores(), kept), Process(flight_stores(), kept)
    whole = await first.ask().read()
    await first.flights.close()
    reader = second.ask()
    assert answer(await reader.read()) == answer(whole)
    assert reader.stream.role == "follower"
    assert (len(second.client.requests), second.writes) == (0, 0)
    await second.flights.close()


async def test_the_key_is_held_until_the_answer_is_kept() -> None:
    """Between the end of the generation and the write, another process still finds the log."""
    store, written = LocalFlightStore(), asyncio.Event()
    first = Process(store)

    async def settle(key: str, timeout_s: float) -> None:
        await written.wait()

    first.flights = SharedFlights(store, settle)
    whole = await first.ask().read()
    second = Process(store)
    reader = second.ask()
    assert answer(await reader.read()) == answer(whole)
    assert second.client.requests == []
    written.set()
    await first.flights.close()
    log = await store.read("k", 0, 0.0)
    assert log.state == "finished"


async def test_a_request_for_something_new_joins_nobody() -> None:
    store = LocalFlightStore()
    first, second = Process(store), Process(store)
    leader = await led(first.ask())
    flight = second.open(fresh=True)
    reader = Reader(flight.subscribe(lambda prompt, delta: None, 30), [])
    assert reader.stream.role == "leader"
    assert answer(await reader.read()) == answer(await leader.read())
    assert len(second.client.requests) == 1
    await first.flights.close()


@pytest.mark.parametrize("chunk", [b"", b"\xff", b"\x92\xa1x\x01", b"\x80"])
async def test_a_log_that_nobody_of_ours_wrote_is_not_believed(chunk: bytes) -> None:
    store = LocalFlightStore()
    assert await store.claim("k", "stranger", 30)
    await store.finish("k", "stranger", chunk, 30) if not chunk else await store.append("k", "stranger", chunk, 30)
    process = Process(store)
    reader = process.ask()
    assert answer(await reader.read()) == await expected()


async def test_a_follower_that_leaves_disturbs_nobody() -> None:
    store = LocalFlightStore()
    first, second = Process(store), Process(store)
    leader, follower = await led(first.ask()), await led(second.ask())
    reading = asyncio.create_task(leader.read())
    await follower.read(most=5)
    assert answer(await reading) == await expected()
    assert len(second.flights) == 0
    await first.flights.close()


async def test_a_log_that_grows_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_log, "MAX_LOG_BYTES", 500)
    store = LocalFlightStore()
    process = Process(store)
    assert answer(await process.ask().read()) == await expected()
    assert store.size <= 500
    await process.flights.close()


class RenewalStore(LocalFlightStore):
    """Its time stands still, so nothing expires; it counts renewals."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.renewals = 0

    async def append(self, key: str, owner: str, chunk: bytes, lease_s: float) -> bool:
        self.renewals += not chunk
        return await super().append(key, owner, chunk, lease_s)


async def test_a_leader_that_is_silent_renews_its_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_log, "CLAIM_S", 0.03)
    store = RenewalStore()
    process = Process(store, hang_after=3)
    reader = await led(process.ask())
    reading = asyncio.create_task(reader.read())
    await until(lambda: store.renewals >= 3)
    reading.cancel()
    await asyncio.wait({reading})
    assert len(store) == 0


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_happens_an_answer_is_whole_or_an_error(
    flight_stores: Stores, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Readers that leave, processes that die and come back, a store that goes away for a moment: in any order."""
    monkeypatch.setattr(flight_log, "CLAIM_S", 0.2)
    monkeypatch.setattr(flight_log, "READ_WAIT_S", 0.05)
    monkeypatch.setattr(flight_log, "KEEP_S", 0.1)
    chance = random.Random(seed)
    whole = {index: delta for _, delta in await expected() for index in [delta.index]}
    processes = [Process(flight_stores(), tokens_per_delta=chance.choice([1, 3, 7])) for _ in range(3)]
    outcomes: list[str] = []

    async def request() -> None:
        process = chance.choice(processes)
        reader = process.ask(chance.choice(["k", "l"]))
        most = chance.choice([None, None, chance.randrange(1, 40)])
        try:
            await reader.read(most)
        except OverloadedError:
            outcomes.append("died")
            assert process.store.away
        else:
            outcomes.append("whole" if most is None else "left")
        for _, delta in join(reader.news):
            expected_delta = whole[delta.index]
            length = len(delta.token_ids)
            assert delta.token_ids == expected_delta.token_ids[:length]
            assert expected_delta.text.startswith(delta.text)
            if outcomes[-1] == "whole":
                assert (delta.text, delta.finish_reason) == (expected_delta.text, "length")

    async def disturb() -> None:
        for _ in range(6):
            await asyncio.sleep(chance.uniform(0.01, 0.1))
            place = chance.randrange(3)
            if chance.random() < 0.5:
                victim = processes[place]
                processes[place] = Process(flight_stores(), tokens_per_delta=chance.choice([1, 3, 7]))
                await victim.die()
            else:
                store = processes[place].store
                store.away = True
                await asyncio.sleep(chance.uniform(0.0, 0.05))
                store.away = False

    async def arrive() -> None:
        async with asyncio.TaskGroup() as requests:
            for _ in range(40):
                requests.create_task(request())
                await asyncio.sleep(chance.uniform(0.0, 0.02))

    async with asyncio.timeout(60):
        await asyncio.gather(arrive(), disturb())
    assert len(outcomes) == 40
    assert outcomes.count("whole") >= 10
    for process in processes:
        assert len(process.flights) == 0
        await process.flights.close()
        assert process.client.active == {}
