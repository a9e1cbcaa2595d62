"""The floors that benchmarks/gateway_overhead.py measures against: `python benchmarks/gateway_floor.py asgi|fastapi|fake --port N`."""

from __future__ import annotations

import click
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.config import ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.app import create_app
from penstock.serving.gateway.server import run_server
from penstock.testing.fake_client import FakeClient


async def empty(scope: Scope, receive: Receive, send: Send) -> None:
    """200 without a body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def empty_fastapi() -> FastAPI:
    """One route that does nothing."""
    app = FastAPI()

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {}

    return app


@click.command()
@click.argument("kind", type=click.Choice(["asgi", "fastapi", "fake"]))
@click.option("--port", type=int, required=True)
def main(kind: str, port: int) -> None:
    """Serve one of the floors on a loopback port."""
    if kind == "fake":
        config = ServerConfig(port=port)
        app = create_app({"fake-model": FakeClient()}, config, settings=GatewayConfig(auth="none"))
        run_server(app, config)
        return
    import uvicorn

    floor: ASGIApp = empty if kind == "asgi" else empty_fastapi()
    uvicorn.run(floor, port=port, log_level="critical", access_log=False, loop="uvloop", http="httptools")


if __name__ == "__main__":
    main()
