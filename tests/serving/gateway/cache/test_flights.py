"""Single flight in one process: one generation, any number of readers, nobody in anybody's way."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from penstock.core.errors import DeadlineExceededError, EngineError, InvalidRequestError, OverloadedError
from penstock.core.types import SamplingParams
from penstock.serving.frontend.client import Delta, GenerationRequest, TextPrompt
from penstock.serving.gateway.cache import flights as flights_module
from penstock.serving.gateway.cache.flights import Flight, Flights
from penstock.serving.gateway.cache.interface import Entry
from penstock.serving.gateway.cache.replay import join
from penstock.serving.gateway.cache.subscription import Subscription
from penstock.serving.gateway.results import News, merge
from penstock.serving.gateway.streaming.delta_stream import DeltaStream
from penstock.testing.fake_client import Behavior, FakeClient

TIMEOUT_S = 30.0


@dataclass
class Bench:
    """Flights over a FakeClient, and what their starters were told."""

    client: FakeClient = field(default_factory=FakeClient)
    flights: Flights = field(default_factory=Flights)
    kept: list[Entry] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    found_at_keeping: list[Flight | None] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def open(self, key: str = "k", *, tokens: int = 8, n: int = 1, prompts: int = 1) -> Flight:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, n=n, logprobs=1)
        number = next(self.numbers)
        requests = [
            GenerationRequest(
                request_id=f"{key}-{number}-{prompt}", prompt=TextPrompt(f"ab{prompt}"), sampling=sampling
            )
            for prompt in range(prompts)
        ]

        async def keep(entry: Entry) -> None:
            self.found_at_keeping.append(self.flights.find(key))
            self.kept.append(entry)

        return self.flights.open(
            key,
            lambda on_delta: DeltaStream(self.client, requests, on_delta, float("inf")),
            lambda: self.ends.append(key),
            keep,
        )


@dataclass
class Reader:
    """One request: what it was told and what it took."""

    stream: Subscription
    told: list[News]
    promotions: list[str]
    taken: list[News] = field(default_factory=list)

    async def read(self, gather_s: float = 0.0, most: int | None = None) -> str:
        """Read to the end, or until `most` news have been taken; the text of sample 0."""
        async with self.stream as stream:
            while await stream.wait(TIMEOUT_S) or not stream.ended:
                await stream.gather(gather_s)
                self.taken += stream.take()
                if most is not None and len(self.taken) >= most:
                    break
        return self.text

    @property
    def text(self) -> str:
        pieces = merge(self.taken, 1)
        return pieces[0].text if pieces else ""


def subscribe(flight: Flight, timeout_s: float = TIMEOUT_S, on_delta: Callable[[], None] = lambda: None) -> Reader:
    told: list[News] = []
    promotions: list[str] = []

    def hear(prompt: int, delta: Delta) -> None:
        told.append((prompt, delta))
        on_delta()

    stream = flight.subscribe(hear, timeout_s, lambda: promotions.append("leader"))
    return Reader(stream, told, promotions)


def said(news: list[News]) -> list[tuple[int, str, list[int], object, str | None]]:
    """What news say, in however many pieces."""
    return [(prompt, delta.text, delta.token_ids, delta.logprobs, delta.finish_reason) for prompt, delta in join(news)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # what it waits for is no event
            await asyncio.sleep(0.001)


async def test_all_readers_get_everything_from_one_generation() -> None:
    bench = Bench()
    flight = bench.open(n=2, prompts=2)
    assert bench.flights.find("k") is flight
    readers = [subscribe(flight) for _ in range(50)]
    await asyncio.gather(*[reader.read() for reader in readers])
    assert len(bench.client.requests) == 2
    leader, *followers = readers
    assert [reader.stream.role for reader in readers] == ["leader"] + ["follower"] * 49
    assert leader.taken == leader.told
    assert len(leader.taken) == 4 * 8
    for follower in followers:
        assert follower.taken == follower.told
        assert merge(follower.taken, 2) == merge(leader.taken, 2)


async def test_the_leader_pays_and_followers_see_a_cached_prompt() -> None:
    bench = Bench(FakeClient(Behavior(num_cached_tokens=1)))
    flight = bench.open()
    leader, follower = subscribe(flight), subscribe(flight)
    await asyncio.gather(leader.read(), follower.read())
    assert {delta.num_cached_tokens for _, delta in leader.told} == {1}
    assert {delta.num_cached_tokens - delta.num_prompt_tokens for _, delta in follower.told} == {0}
    assert [delta.queue_time_s for _, delta in leader.told if delta.queue_time_s is not None] == [0.001]
    assert all(delta.queue_time_s is None for _, delta in follower.told)


async def test_who_comes_late_gets_what_has_been_and_what_comes() -> None:
    bench = Bench(FakeClient(Behavior(interval_s=0.002)))
    flight = bench.open(tokens=30)
    leader = subscribe(flight)
    reading = asyncio.create_task(leader.read())
    await until(lambda: len(leader.told) >= 10)
    late = subscribe(flight)
    async with late.stream as stream:
        # In one piece, so that nobody measures times between these tokens.
        assert len(late.told) == 1
        assert len(late.told[0][1].token_ids) >= 10
        assert await stream.wait(TIMEOUT_S)
        late.taken += stream.take()
        while await stream.wait(TIMEOUT_S) or not stream.ended:
            late.taken += stream.take()
    await reading
    assert said(late.told) == said(late.taken) == said(leader.told)


async def test_a_reader_after_the_end_still_gets_everything() -> None:
    bench = Bench()
    flight = bench.open()
    leader, idle = subscribe(flight), subscribe(flight)
    await leader.read()
    assert flight.ended
    assert await idle.read() == leader.text
    assert bench.ends == ["k"]


async def test_the_whole_answer_is_kept_before_the_flight_is_gone() -> None:
    bench = Bench(FakeClient(Behavior(num_cached_tokens=1)))
    flight = bench.open(n=2, prompts=2)
    await subscribe(flight).read()
    assert bench.found_at_keeping == [flight]
    assert bench.flights.find("k") is None
    assert len(bench.flights) == 0
    [entry] = bench.kept
    assert [(prompt, delta.index) for prompt, delta in entry.news] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for _, delta in entry.news:
        assert len(delta.token_ids) == len(delta.logprobs or []) == delta.num_output_tokens == 8
        assert delta.num_cached_tokens == delta.num_prompt_tokens
        assert delta.queue_time_s is None
        assert (delta.prompt_token_ids is not None) == (delta.index == 0)


async def test_the_others_live_on_when_the_leader_leaves() -> None:
    bench = Bench(FakeClient(Behavior(interval_s=0.002)))
    flight = bench.open(tokens=40)
    leader, second, third = subscribe(flight), subscribe(flight), subscribe(flight)
    reads = [asyncio.create_task(reader.read()) for reader in (second, third)]
    await leader.read(most=5)
    assert second.stream.role == "leader"
    assert (second.promotions, third.promotions) == (["leader"], [])
    texts = await asyncio.gather(*reads)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 40
    assert len(bench.client.requests) == 1
    assert bench.client.closed_early == []
    assert len(bench.kept) == 1
    # From its promotion on it sees what the prompt really cost.
    assert second.told[0][1].num_cached_tokens == second.told[0][1].num_prompt_tokens
    assert second.told[-1][1].num_cached_tokens == 0
    assert third.told[-1][1].num_cached_tokens == third.told[-1][1].num_prompt_tokens


async def test_a_cancelled_leader_counts_as_one_that_left() -> None:
    bench = Bench(FakeClient(Behavior(interval_s=0.002)))
    flight = bench.open(tokens=40)
    leader, second = subscribe(flight), subscribe(flight)
    reading, other = asyncio.create_task(leader.read()), asyncio.create_task(second.read())
    await until(lambda: len(leader.told) >= 3)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert len(await other) == 40


async def test_the_last_reader_ends_the_generation() -> None:
    bench = Bench(FakeClient(Behavior(interval_s=0.002)))
    flight = bench.open(tokens=400)
    readers = [subscribe(flight) for _ in range(3)]
    await asyncio.gather(*[reader.read(most=3) for reader in readers])
    assert bench.client.closed_early == [bench.client.requests[0].request_id]
    assert bench.flights.find("k") is None
    assert (bench.kept, bench.ends) == ([], ["k"])
    assert len(bench.flights) == 0


async def test_a_reader_that_never_begins_can_leave() -> None:
    bench = Bench()
    flight = bench.open()
    reader = subscribe(flight)
    reader.stream.close()
    reader.stream.close()
    await flight.stopped_if_deserted()
    assert (bench.client.requests, bench.kept, bench.ends) == ([], [], ["k"])


async def test_after_the_last_reader_a_new_request_begins_anew() -> None:
    bench = Bench(FakeClient(Behavior(hang_after=1)))
    first = subscribe(bench.open())
    await first.read(most=1)
    bench.client.behavior = Behavior()
    assert len(await subscribe(bench.open()).read()) == 8
    assert bench.ends == ["k", "k"]


async def test_every_reader_has_its_own_deadline() -> None:
    bench = Bench(FakeClient(Behavior(hang_after=3)))
    flight = bench.open()
    hurried, patient = subscribe(flight, timeout_s=0.05), subscribe(flight)
    waiting = asyncio.create_task(patient.read())
    with pytest.raises(DeadlineExceededError):
        await hurried.read()
    assert len(hurried.taken) == 3
    assert not waiting.done()
    assert patient.stream.role == "leader"
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert bench.client.closed_early


async def test_a_failure_reaches_every_reader_and_is_not_kept() -> None:
    error = EngineError("It broke.", code="broken")
    bench = Bench(FakeClient(Behavior(error=error, error_after=3)))
    flight = bench.open()
    readers = [subscribe(flight) for _ in range(3)]
    results = await asyncio.gather(*[reader.read() for reader in readers], return_exceptions=True)
    assert results == [error] * 3
    # What came before was delivered.
    assert [len(reader.taken) for reader in readers] == [3, 3, 3]
    assert (bench.kept, bench.ends) == ([], ["k"])
    assert bench.flights.find("k") is None
    bench.client.behavior = Behavior()
    assert len(await subscribe(bench.open()).read()) == 8


async def test_an_invalid_request_is_told_so() -> None:
    bench = Bench(FakeClient(Behavior(error=InvalidRequestError("No.", param="prompt"))))
    with pytest.raises(InvalidRequestError):
        await subscribe(bench.open()).read()


async def test_an_unforeseen_failure_is_told_without_details(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(FakeClient(Behavior(error=ZeroDivisionError("secret"))))
    with pytest.raises(EngineError) as caught:
        await subscribe(bench.open()).read()
    assert "secret" not in caught.value.message
    assert caught.value.code == "internal_error"
    assert "secret" in caplog.text


async def test_one_readers_fault_is_its_own() -> None:
    bench = Bench()
    flight = bench.open()

    def fail() -> None:
        raise ValueError("mine")

    good, bad = subscribe(flight), subscribe(flight, on_delta=fail)
    results = await asyncio.gather(good.read(), bad.read(), return_exceptions=True)
    assert results[0] == good.text
    assert len(good.text) == 8
    assert isinstance(results[1], ValueError)
    assert len(bench.kept) == 1


async def test_an_answer_that_cannot_be_kept_is_still_delivered(caplog: pytest.LogCaptureFixture) -> None:
    client, flights = FakeClient(), Flights()
    request = GenerationRequest(request_id="r", prompt=TextPrompt("ab"), sampling=SamplingParams(max_tokens=4))

    def fail() -> None:
        raise OSError("the slot is lost")

    async def keep(entry: Entry) -> None:
        raise OSError("the store is full")

    flight = flights.open("k", lambda on_delta: DeltaStream(client, [request], on_delta, 30), fail, keep)
    assert len(await subscribe(flight).read()) == 4
    assert "could not be kept" in caplog.text
    assert "could not be noted" in caplog.text


async def test_a_slow_reader_slows_nobody() -> None:
    bench = Bench()
    flight = bench.open(tokens=2000)
    slow, fast = subscribe(flight), subscribe(flight)
    async with slow.stream as stream:
        assert len(await fast.read()) == 2000
        assert flight.ended
        # It has taken nothing yet; now it gets all in one piece.
        assert await stream.wait(TIMEOUT_S)
        slow.taken += stream.take()
        assert not await stream.wait(TIMEOUT_S)
    assert slow.text == fast.text


async def test_a_long_answer_does_not_stay_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all readers have taken is folded; readers at any position and later ones still get everything once."""
    monkeypatch.setattr(flights_module, "FOLD", 16)
    bench = Bench(FakeClient(Behavior(interval_s=0.0)))
    flight = bench.open(tokens=700, n=2)
    steady, idle, stalled = subscribe(flight), subscribe(flight), subscribe(flight)
    async with stalled.stream as stream:
        assert await stream.wait(TIMEOUT_S)
        stalled.taken += stream.take()
        reading = asyncio.create_task(steady.read())
        await until(lambda: len(steady.taken) >= 400)
        assert stalled.stream.role == "follower"
        assert len(flight._log) >= 300
        while await stream.wait(TIMEOUT_S) and len(stalled.taken) < 200:
            stalled.taken += stream.take()
        stalled.stream.close()
        late = subscribe(flight)
        await until(lambda: len(steady.taken) >= 900)
        assert len(flight._log) < 100
        texts = await asyncio.gather(reading, idle.read(), late.read())
    assert flight.length == 1400
    assert said(steady.taken) == said(idle.taken) == said(late.taken) == said(late.told)
    assert [len(token_ids) for _, _, token_ids, _, _ in said(steady.taken)] == [700, 700]
    assert len(set(texts)) == 1
    [entry] = bench.kept
    assert [delta.num_output_tokens for _, delta in entry.news] == [700, 700]


async def test_gather_merges_and_ends_with_the_generation() -> None:
    bench = Bench()
    leader = subscribe(bench.open())
    async with leader.stream as stream:
        await stream.wait(TIMEOUT_S)
        await stream.gather(TIMEOUT_S)
        assert len(stream.take()) == 8
        assert not await stream.wait(TIMEOUT_S)
        assert stream.ended


async def test_a_new_flight_takes_the_key_and_the_old_one_goes_on() -> None:
    bench = Bench(FakeClient(Behavior(interval_s=0.001)))
    first = bench.open()
    old = subscribe(first)
    second = bench.open()
    new = subscribe(second)
    assert bench.flights.find("k") is second
    await asyncio.gather(old.read(), new.read())
    assert old.text == new.text
    assert len(bench.client.requests) == 2
    assert bench.flights.find("k") is None


async def test_other_keys_have_other_flights() -> None:
    bench = Bench()
    one, other = bench.open("one"), bench.open("other")
    assert bench.flights.find("one") is one
    assert bench.flights.find("other") is other
    assert bench.flights.find("third") is None
    await asyncio.gather(subscribe(one).read(), subscribe(other).read())
    assert len(bench.client.requests) == 2


async def test_closing_ends_what_is_in_flight() -> None:
    bench = Bench(FakeClient(Behavior(hang_after=2)))
    flight = bench.open()
    reader = subscribe(flight)
    reading = asyncio.create_task(reader.read())
    await until(lambda: len(reader.told) == 2)
    await bench.flights.close()
    with pytest.raises(OverloadedError):
        await reading
    assert bench.client.closed_early
    assert (bench.kept, bench.ends) == ([], ["k"])


async def test_many_come_and_go_and_nothing_is_left() -> None:
    bench = Bench(FakeClient(Behavior(interval_s=0.0005)))

    async def request(number: int) -> None:
        await asyncio.sleep(number % 7 * 0.002)
        flight = bench.flights.find("k") or bench.open(tokens=30)
        reader = subscribe(flight)
        text = await reader.read(most=None if number % 3 else number % 11 + 1)
        assert text == ("ab0" * 10)[: len(text)]
        assert len(text) == 30 or number % 3 == 0

    await asyncio.gather(*[request(number) for number in range(200)])
    assert len(bench.flights) == 0
    assert bench.client.active == {}
    assert len(bench.ends) == len(bench.client.requests) < 60
