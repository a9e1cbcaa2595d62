"""The engine's main loop: messages in, steps, messages out. Runs in the engine's own process, or in a thread for embedding."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from penstock.core.errors import OverloadedError, RequestError
from penstock.core.transport import ClientId, EngineEndpoint
from penstock.core.types import (
    CLIENT_TIMEOUT_S,
    STATUS_INTERVAL_S,
    Abort,
    Configure,
    Configured,
    Connect,
    Deltas,
    Disconnect,
    Drain,
    EngineRequest,
    FromEngine,
    Hello,
    Ping,
    Status,
    Submit,
    ToEngine,
    TokenDelta,
)
from penstock.engine.engine import Addressed, Engine, merge_deltas

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5


class EngineLoop:
    """Serves one engine to the clients of one endpoint until told to drain or to stop.

    Never waits for a client: news that a client cannot take now is kept, merged per sample, and sent with the next. A client that is
    silent for CLIENT_TIMEOUT_S is dropped and its requests are aborted.
    """

    def __init__(
        self,
        engine: Engine,
        endpoint: EngineEndpoint,
        timeline: list[tuple[str, float]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._endpoint = endpoint
        self._timeline = timeline
        self._clock = clock
        self._last_heard: dict[ClientId, float] = {}
        self._unsent: dict[ClientId, dict[tuple[str, int], TokenDelta]] = {}
        self._last_status = clock()
        self._draining = False
        self._stopped = False
        self._was_busy = False

    def stop(self) -> None:
        """Leave the loop after the current round. May be called from another thread or a signal handler."""
        self._stopped = True

    def run(self) -> None:
        """Serve until stopped or drained. Raises what the engine raises when it can no longer be trusted."""
        while not self._stopped:
            busy = self._engine.has_work()
            if self._draining and not busy and not self._unsent:
                break
            for client, message in self._endpoint.receive(self._wait_s(busy)):
                self._last_heard[client] = self._clock()
                self._handle(client, message)
            self._deliver(self._engine.expire())
            if self._engine.has_work():
                deltas = self._engine.step()
                begun = self._clock()
                self._deliver(deltas)
                self._engine.counters.phase_seconds["deliver"] += self._clock() - begun
                self._was_busy = True
            elif self._was_busy:
                self._engine.check_integrity()
                self._was_busy = False
            self._retry_unsent()
            self._send_status()
            self._drop_silent_clients()

    def _wait_s(self, busy: bool) -> float:
        if busy:
            return 0.0
        return 0.005 if self._unsent else IDLE_WAIT_S

    def _handle(self, client: ClientId, message: ToEngine) -> None:
        match message:
            case Submit(request):
                self._submit(client, request)
            case Abort(request_ids, indices):
                for request_id in request_ids:
                    self._deliver(self._engine.abort(client, request_id, indices))
            case Connect():
                self._send(client, Hello(model=self._engine.model, timeline=self._timeline))
            case Ping():
                self._send(client, Status(stats=self._engine.stats()))
            case Configure(call_id, limits):
                try:
                    answer = Configured(call_id=call_id, limits=self._engine.configure(limits))
                except RequestError as error:
                    answer = Configured(call_id=call_id, limits=self._engine.stats().limits, error=error.info)
                self._send(client, answer)
            case Drain():
                self._draining = True
            case Disconnect():
                self._forget_client(client)

    def _submit(self, client: ClientId, request: EngineRequest) -> None:
        if self._draining:
            error = OverloadedError("The server is shutting down.").info
            self._deliver(self._engine.refuse(request, error, client))
        else:
            self._deliver(self._engine.add(request, client))

    def _deliver(self, deltas: list[Addressed]) -> None:
        by_client: dict[ClientId, list[TokenDelta]] = {}
        for client, delta in deltas:
            by_client.setdefault(client, []).append(delta)
        for client, news in by_client.items():
            if client not in self._last_heard:
                continue
            if client in self._unsent or not self._endpoint.send(client, Deltas(news)):
                self._keep(client, news)

    def _keep(self, client: ClientId, news: list[TokenDelta]) -> None:
        unsent = self._unsent.setdefault(client, {})
        for delta in news:
            sample = (delta.request_id, delta.index)
            earlier = unsent.get(sample)
            unsent[sample] = delta if earlier is None else merge_deltas(earlier, delta)

    def _retry_unsent(self) -> None:
        for client, news in list(self._unsent.items()):
            if self._endpoint.send(client, Deltas(list(news.values()))):
                del self._unsent[client]

    def _send(self, client: ClientId, message: FromEngine) -> None:
        if not self._endpoint.send(client, message):
            logger.warning("a client takes no messages; dropped a %s", type(message).__name__)

    def _send_status(self) -> None:
        now = self._clock()
        if now - self._last_status >= STATUS_INTERVAL_S:
            self._last_status = now
            status = Status(stats=self._engine.stats())
            for client in self._last_heard:
                self._endpoint.send(client, status)

    def _drop_silent_clients(self) -> None:
        now = self._clock()
        for client in [c for c, heard in self._last_heard.items() if now - heard > CLIENT_TIMEOUT_S]:
            # What it sent during a long step is still in the socket.
            for sender, message in self._endpoint.receive(0.0):
                self._last_heard[sender] = now
                self._handle(sender, message)
            if now - self._last_heard.get(client, now) > CLIENT_TIMEOUT_S:
                logger.warning("a client was silent for %.0f s; its requests are aborted", CLIENT_TIMEOUT_S)
                self._forget_client(client)

    def _forget_client(self, client: ClientId) -> None:
        self._engine.abort_client(client)
        self._last_heard.pop(client, None)
        self._unsent.pop(client, None)
