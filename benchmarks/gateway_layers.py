"""What does each layer of the gateway cost on a cache hit? The layers are put around the endpoint one by one and called without a socket.

    python benchmarks/gateway_layers.py

The request has a key with three limits; the answer comes from the cache in memory. Rounds take the stacks in turns; a layer's cost is the
difference to the stack without it, of the medians.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from common import Options, Results, script_options
from penstock.core.config import ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.app import create_app
from penstock.serving.gateway.context import context_of
from penstock.serving.gateway.generation.chat import CHAT
from penstock.serving.gateway.identity import RateLimits
from penstock.serving.gateway.middleware.access import AccessMiddleware
from penstock.serving.gateway.middleware.body_limit import BodyLimitMiddleware
from penstock.serving.gateway.middleware.error_boundary import ErrorBoundaryMiddleware
from penstock.serving.gateway.middleware.gate import GateMiddleware
from penstock.serving.gateway.middleware.request_id import RequestIdMiddleware
from penstock.serving.gateway.security.build import add_security
from penstock.serving.gateway.services import build_services
from penstock.telemetry.recorder import Recorder
from penstock.testing.accounts import FakeKeys
from penstock.testing.fake_client import FakeClient

CALLS = 500
QUESTION = {"model": "m", "messages": [{"role": "user", "content": "Tell me about a fox."}]}
BODY = json.dumps(QUESTION | {"max_tokens": 32, "temperature": 0}).encode()


@script_options
def main(options: Options) -> None:
    """Microseconds per layer of a cache hit."""
    results = Results("gateway_layers", options)
    data = results.section("layers", lambda: asyncio.run(_measure(options)))
    rows = [["layer", "µs", "µs with all inside it"]]
    inner = 0.0
    for name, microseconds in data.items():
        rows.append([name, f"{microseconds - inner:.1f}", f"{microseconds:.1f}"])
        inner = microseconds
    results.publish(rows, [f"Medians over rounds of {CALLS} calls, one after the other, without a socket."])


async def _measure(options: Options) -> dict[str, float]:
    settings, recorder, keys = GatewayConfig(auth="keys"), Recorder(), FakeKeys()
    services = build_services(settings, recorder, "1")
    services.keys = keys
    token = keys.add("tenant", limits=RateLimits(10**8, 10**11, 1000))
    app = create_app({"m": FakeClient()}, ServerConfig(), recorder, settings=settings, services=services)
    async with services:
        identity = (await _find(keys, token)).identity
        rounds = options.repeat(15, 3)
        stacks = _stacks(app, keys)
        times: dict[str, list[float]] = {name: [] for name in stacks}
        for _ in range(rounds + 1):
            for name, stack in stacks.items():
                started = time.perf_counter()
                for _ in range(CALLS):
                    await _call(stack, token, identity)
                times[name].append((time.perf_counter() - started) / CALLS * 1e6)
    # The first round fills the cache and warms up.
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _stacks(app: Any, keys: FakeKeys) -> dict[str, ASGIApp]:
    gateway = app.state.gateway
    endpoint = app.endpoints[CHAT.path]
    body_limit = BodyLimitMiddleware(endpoint, gateway.config.max_body_bytes)
    gate = GateMiddleware(body_limit, gateway, frozenset(app.endpoints))
    security = add_security(gate, gateway.settings, gateway.config, keys, gateway.recorder)
    boundary = ErrorBoundaryMiddleware(security)
    access = AccessMiddleware(boundary, gateway.recorder)
    return {
        "endpoint: parse, key, cache, limits, answer": endpoint,
        "body limit": body_limit,
        "gate": gate,
        "security: host, key": security,
        "error boundary": boundary,
        "access log and metrics": access,
        "request id and headers": RequestIdMiddleware(access),
    }


async def _find(keys: FakeKeys, token: str) -> Any:
    return await keys.find(token.split("_")[1])


async def _call(app: ASGIApp, token: str, identity: Any) -> None:
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    headers += [(b"content-length", b"%d" % len(BODY)), (b"authorization", f"Bearer {token}".encode())]
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT.path,
        "raw_path": CHAT.path.encode(),
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "scheme": "http",
    }
    context_of(scope).identity = identity

    received = False

    async def receive() -> Message:
        nonlocal received
        if received:
            # The client stays.
            await asyncio.Event().wait()
        received = True
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise SystemExit(f"status {message['status']}")

    await app(scope, receive, send)


if __name__ == "__main__":
    main()
