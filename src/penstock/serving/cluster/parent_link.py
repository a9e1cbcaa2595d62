"""A gateway worker's (or the coordinator's) end of the control channel."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable

import msgspec

from penstock.core.errors import OverloadedError
from penstock.core.framing import FrameError
from penstock.serving.cluster.control_channel import (
    BEAT_INTERVAL_S,
    Beat,
    Begin,
    Collect,
    Collected,
    ControlChannel,
    Merged,
    Scrape,
    Started,
    StartFailed,
    ToChild,
    ToParent,
)
from penstock.telemetry.aggregate import merge, snapshot
from penstock.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

# Above the parent's own time-out for the slowest of the processes that it asks.
SCRAPE_TIMEOUT_S = 3.0


class ParentLink:
    """`begin` first; then `serve`, which runs until the parent closes the channel. `finished_requests`: asked for every second."""

    def __init__(self, channel: ControlChannel[ToChild], recorder: Recorder) -> None:
        self._channel = channel
        self._recorder = recorder
        self._call_ids = itertools.count()
        self._scrapes: dict[int, asyncio.Future[Recorder]] = {}

    @classmethod
    async def open(cls, descriptor: int, recorder: Recorder) -> ParentLink:
        """Take over the inherited end of the channel."""
        return cls(await ControlChannel[ToChild].open(socket.socket(fileno=descriptor), ToChild), recorder)

    async def begin(self) -> Begin:
        """The settings. Raises ConnectionError when the parent has gone."""
        message = await self._channel.receive()
        if not isinstance(message, Begin):
            raise ConnectionError("the parent of this process said no settings")
        return message

    def send(self, message: ToParent) -> None:
        """Tell the parent; never waits."""
        self._channel.send(message)

    async def fail(self, message: str) -> None:
        """This process cannot start."""
        self._channel.send(StartFailed(message))
        await self._channel.close()

    async def serve(self, on_message: Callable[[ToChild], None], finished_requests: Callable[[], int]) -> None:
        """Say that this process serves, give signs of life and hand over what the parent says, until the parent is gone."""
        self._channel.send(Started())
        beating = asyncio.create_task(self._beat(finished_requests))
        try:
            while (message := await self._channel.receive()) is not None:
                match message:
                    case Collect(call_id):
                        self._channel.send(Collected(call_id, snapshot(self._recorder)))
                    case Merged(call_id, merged):
                        scrape = self._scrapes.get(call_id)
                        if scrape is not None and not scrape.done():
                            scrape.set_result(merge([merged]))
                    case _:
                        on_message(message)
        except (OSError, FrameError, msgspec.MsgspecError) as error:
            logger.error("the channel to the parent process broke: %s", error)
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def scrape(self) -> Recorder:
        """The metrics of all processes as one. Raises OverloadedError when the parent does not answer: fewer than all would look like
        counters that go back."""
        call_id = next(self._call_ids)
        answer: asyncio.Future[Recorder] = asyncio.get_running_loop().create_future()
        self._scrapes[call_id] = answer
        self._channel.send(Scrape(call_id))
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise OverloadedError("The metrics of the other gateway processes did not come in time.") from None
        finally:
            del self._scrapes[call_id]

    async def close(self, finished_requests: int) -> None:
        """Say what was counted last, and leave."""
        self._channel.send(Beat(finished_requests, snapshot(self._recorder)))
        await self._channel.close()

    async def _beat(self, finished_requests: Callable[[], int]) -> None:
        while True:
            self._channel.send(Beat(finished_requests(), snapshot(self._recorder)))
            await asyncio.sleep(BEAT_INTERVAL_S)
