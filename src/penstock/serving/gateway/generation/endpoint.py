"""The endpoint of generations as raw ASGI: a cache hit costs microseconds, so nothing here goes through a framework.

    parse ─▶ plan ─▶ cache? ──hit──▶ limits (nothing reserved) ─▶ replay
                       └─ no ─▶ limits (reserve) ─▶ admission ─▶ generate alone (bypass), lead (miss), or follow (coalesced)

Whatever the end, Charge settles it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Generic

import msgspec
from starlette.types import Receive, Scope, Send

from penstock.core.errors import EngineDeadError
from penstock.core.ids import RandomIds
from penstock.core.types import ModelInfo
from penstock.serving.frontend.client import Delta, EngineClient
from penstock.serving.gateway.admission import AdmissionSlot
from penstock.serving.gateway.body import read_body
from penstock.serving.gateway.cache.interface import Entry
from penstock.serving.gateway.cache.policy import Plan
from penstock.serving.gateway.cache.replay import ReplayStream
from penstock.serving.gateway.cache.response_cache import KeyMemo
from penstock.serving.gateway.context import RequestContext, context_of
from penstock.serving.gateway.errors import as_request_error
from penstock.serving.gateway.generation.call import Body, Call, Kind, Renderer, make_call
from penstock.serving.gateway.generation.charge import Charge
from penstock.serving.gateway.generation.measure import Measurement
from penstock.serving.gateway.generation.parsed import Parser
from penstock.serving.gateway.results import News, Tally, merge, prompt_facts
from penstock.serving.gateway.state import Gateway
from penstock.serving.gateway.streaming.delta_stream import DeltaStream
from penstock.serving.gateway.streaming.disconnect import while_connected
from penstock.serving.gateway.streaming.news_stream import NewsStream
from penstock.serving.gateway.streaming.sse import SseResponse

CACHE_HEADER = b"x-penstock-cache"

_encode = msgspec.json.Encoder().encode


class GenerationEndpoint(Generic[Body]):
    """Answers POST requests of one kind. Raises the request's error while nothing has been sent; ErrorBoundary renders it."""

    def __init__(self, gateway: Gateway, kind: Kind[Body]) -> None:
        self._gateway = gateway
        self._kind = kind
        self._parser = Parser(kind)
        self._ids = RandomIds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        gateway.check_accepting()
        gateway.preparing += 1
        try:
            answer = await self._prepare(scope, receive)
        finally:
            gateway.preparing -= 1
        if answer.streams:
            await answer.stream(scope, receive, send)
        else:
            await answer.whole(receive, send)

    async def _prepare(self, scope: Scope, receive: Receive) -> _Answer:
        """Parse, look up, charge. Raises the request's error."""
        gateway, context = self._gateway, context_of(scope)
        parsed = self._parser.parse(await read_body(scope, receive))
        body = parsed.body
        call_id = f"{self._kind.id_prefix}-{self._ids.take()}"
        call = make_call(gateway, call_id, body, parsed.prompts, parsed.sampling, context.identity, scope["headers"])
        info = await _model_info(call.client)
        plan = self._plan(call, info, scope, parsed.memo)
        entry = await gateway.services.cache.lookup(plan)
        estimate = (0, 0) if entry is not None else gateway.services.limiter.estimate(call.prompts, call.sampling)
        ticket = await gateway.services.limiter.admit(call.identity, call.id, *estimate)
        context.response_headers.update(ticket.headers)
        tally = Tally()
        charge = Charge(gateway, call, tally, ticket)
        renderer = self._kind.renderer(call, body)
        tokens = _at_most_what_fits(sum(estimate), call, info)
        return _Answer(gateway, call, renderer, plan, entry, info, tokens, tally, charge, context)

    def _plan(self, call: Call, info: ModelInfo | None, scope: Scope, memo: KeyMemo) -> Plan:
        return self._gateway.services.cache.plan(
            identity=call.identity,
            model_name=call.model,
            info=info,
            endpoint=self._kind.name,
            prompts=call.prompts,
            sampling=call.sampling,
            client_seed=call.body.seed is not None,
            cache_salt=call.body.cache_salt or "",
            headers=scope["headers"],
            body_cache=call.body.cache,
            memo=memo,
        )


class _Answer:
    """One answer in the making."""

    def __init__(
        self,
        gateway: Gateway,
        call: Call,
        renderer: Renderer,
        plan: Plan,
        entry: Entry | None,
        info: ModelInfo | None,
        tokens: int,
        tally: Tally,
        charge: Charge,
        context: RequestContext,
    ) -> None:
        self._gateway = gateway
        self._call = call
        self._renderer = renderer
        self._plan = plan
        self._entry = entry
        self._info = info
        self._tokens = tokens
        self._tally = tally
        self._charge = charge
        self._context = context
        self.streams = call.body.stream
        self._measurement = Measurement(gateway, call.model, tally, from_cache=entry is not None)

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events."""
        config, body = self._gateway.config, self._call.body
        response = SseResponse(
            open_stream=self._open,
            on_start=self._note_outcome,
            books=self._books(),
            tally=self._tally,
            renderer=self._renderer,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            coalesce_s=config.stream_coalesce_s,
            ping_s=config.sse_ping_s,
            timeout_s=self._call.timeout_s,
        )
        await response(scope, receive, send)

    async def whole(self, receive: Receive, send: Send) -> None:
        """One JSON object."""
        with self._charge, self._measurement:
            if self._entry is not None:
                news = self._replay(self._entry)
            else:
                news = await while_connected(receive, self._collect())
            self._note_outcome()
            pieces = sorted(merge(news, self._call.sampling.n), key=lambda piece: piece.index)
            body = _encode(await self._renderer.whole(pieces, prompt_facts(news), self._tally.usage()))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _replay(self, entry: Entry) -> list[News]:
        """All of a kept answer at once."""
        self._charge.source = lambda: "hit"
        for prompt, delta in entry.news:
            self._on_delta(prompt, delta)
        return entry.news

    async def _collect(self) -> list[News]:
        news: list[News] = []
        timeout_s = self._call.timeout_s
        try:
            async with self._open() as stream:
                # A wait without news says nothing: the clock may be a hair short of the deadline, which then raises.
                while await stream.wait(timeout_s) or not stream.ended:
                    # Deltas by the handful instead of one by one: nobody reads a part of this answer.
                    await stream.gather(0.05)
                    news += stream.take()
        except Exception as error:
            raise as_request_error(error) from None
        return news

    def _books(self) -> ExitStack:
        """Metrics and charges of this request, closed together."""
        stack = ExitStack()
        stack.enter_context(self._charge)
        stack.enter_context(self._measurement)
        return stack

    def _note_outcome(self) -> None:
        """The response begins: say where it comes from."""
        outcome = self._charge.source()
        self._context.response_headers[CACHE_HEADER] = outcome.encode()
        self._measurement.cache_outcome(outcome)

    def _on_delta(self, prompt: int, delta: Delta) -> None:
        self._tally.add(prompt, delta)
        self._measurement.on_delta(prompt, delta)

    def _open(self) -> NewsStream:
        """The stream that this answer reads. Raises OverloadedError when the engine takes no more."""
        call, services = self._call, self._gateway.services
        entry = self._entry or services.cache.peek(self._plan)
        if entry is not None:
            self._charge.source = lambda: "hit"
            return ReplayStream(entry, self._on_delta)
        if self._plan.key is None:
            self._charge.slot = self._enter()
            requests = call.engine_requests(call.sampling, call.timeout_s)
            return DeltaStream(call.client, requests, self._on_delta, call.timeout_s)
        flight = services.cache.find(self._plan)
        if flight is None:
            flight = services.cache.open(self._plan, self._start, self._enter().leave, call.client.model_info)
        subscription = flight.subscribe(self._on_delta, call.timeout_s, on_promoted=self._charge.promoted)
        self._charge.source = lambda: "miss" if subscription.role == "leader" else "coalesced"
        return subscription

    def _enter(self) -> AdmissionSlot:
        call = self._call
        admission = self._gateway.services.admission
        return admission.enter(call.model, self._tokens, self._info, tenant=call.identity.tenant)

    def _start(self, on_delta: Callable[[int, Delta], None]) -> DeltaStream:
        """The generation that this answer leads. It has no deadline: its readers have theirs, and it ends with the last of them."""
        requests = self._call.engine_requests(self._plan.sampling(self._call.sampling), None)
        return DeltaStream(self._call.client, requests, on_delta, math.inf)


def _at_most_what_fits(tokens: int, call: Call, info: ModelInfo | None) -> int:
    """What admission reserves. A request that asks for more than the model's context is not refused for want of room: the engine's frontend
    tells it what is wrong."""
    if info is None or not info.max_request_tokens:
        return tokens
    return min(tokens, info.max_request_tokens * len(call.prompts) * call.sampling.n)


async def _model_info(client: EngineClient) -> ModelInfo | None:
    """None while the engine starts for the first time; the request then waits for it."""
    try:
        return await client.model_info()
    except EngineDeadError:
        return None
