"""`penstock serve MODEL`: the engine process and the OpenAI-compatible API in front of it."""

from __future__ import annotations

from typing import Any

import click

from penstock.cli.options import SettingsCommand, config_from, with_settings
from penstock.core.config import EMBEDDED_MODEL, NGRAM, EngineConfig, ServerConfig
from penstock.core.gateway_config import GatewayConfig


@click.command(cls=SettingsCommand)
@click.argument("model", default=EMBEDDED_MODEL, envvar="PENSTOCK_MODEL")
@with_settings(EngineConfig, ServerConfig, GatewayConfig)
def serve(**values: Any) -> int:
    """Serve MODEL through the OpenAI-compatible API.

    MODEL is a Hugging Face model folder, a hub name (ORG/NAME, pulled if it is not here yet),
    or 'stories', the embedded model (default).

    On a loopback address anyone on this machine may use the server. To expose it, make a key first
    (`penstock keys create --tenant NAME`) and add --host 0.0.0.0.

    Every setting can also come from the environment as PENSTOCK_<NAME>, such as PENSTOCK_PORT=9000; a flag beats it.
    """
    engine = config_from(EngineConfig, values)
    server = config_from(ServerConfig, values)
    gateway = config_from(GatewayConfig, values)
    _require_server_packages(gateway)
    from penstock.cli.pull import ensure_model

    # A wrong name is told before anything heavy is imported.
    ensure_model(engine.model, engine.revision)
    if engine.speculative_model not in ("", NGRAM):
        ensure_model(engine.speculative_model, None)
    from penstock.launch import serve as launch_serve

    return launch_serve(engine, server, gateway)


def _require_server_packages(gateway: GatewayConfig) -> None:
    from penstock.cli.packages import require

    require("server", "fastapi", "uvicorn", "zmq", "prometheus_client", "httpx")
    if gateway.redis_url:
        require("redis", "redis")
    if (gateway.database_url or "").startswith("postgres"):
        require("postgresql", "asyncpg")
