"""Puts the parts of security around an application.

forwarded (whose address) → hosts (which name, which origin) → CORS → authentication (who) → app
"""

from __future__ import annotations

from starlette.types import ASGIApp

from penstock.core.config import ServerConfig
from penstock.core.errors import ConfigError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.accounts.interface import KeyDirectory
from penstock.serving.gateway.middleware.authentication import AuthenticationMiddleware
from penstock.serving.gateway.middleware.cors import add_cors
from penstock.serving.gateway.middleware.forwarded import ForwardedMiddleware
from penstock.serving.gateway.middleware.hosts import HostRules, HostsMiddleware
from penstock.serving.gateway.security.addresses import is_loopback, parse_networks
from penstock.serving.gateway.security.authenticator import Authenticator, TokenVerifier
from penstock.serving.gateway.security.routes import RouteTable, parse_open_routes
from penstock.serving.gateway.security.startup import read_secret, resolve_auth
from penstock.serving.gateway.security.tenants import TenantSource, TenantTerms
from penstock.serving.gateway.security.throttle import FailureThrottle
from penstock.telemetry.recorder import Recorder

_MIN_SCRAPE_TOKEN_BYTES = 16


def add_security(
    app: ASGIApp,
    config: GatewayConfig,
    server: ServerConfig,
    keys: KeyDirectory | None,
    recorder: Recorder,
    *,
    tenants: TenantSource | None = None,
) -> ASGIApp:
    """`app` behind everything that decides who may ask. `keys` is needed where --auth says keys; `tenants` gives tokens the limits of
    their tenant. Raises ConfigError."""
    config = resolve_auth(config, server.host)
    if "keys" in config.auth_methods and keys is None:
        raise ConfigError("--auth keys needs the database of accounts.")
    authenticator = build_authenticator(config, keys, recorder, tenants)
    app = AuthenticationMiddleware(
        app,
        authenticator,
        RouteTable(parse_open_routes(config.open_routes)),
        required=bool(config.auth_methods),
        keys=keys,
    )
    origins = parse_origins(config.cors_origins)
    if origins:
        app = add_cors(app, origins)
    app = HostsMiddleware(app, host_rules(config, server.host))
    trusted = parse_networks(config.forwarded_allow_ips)
    return ForwardedMiddleware(app, trusted) if trusted else app


def build_authenticator(
    config: GatewayConfig, keys: KeyDirectory | None, recorder: Recorder, tenants: TenantSource | None = None
) -> Authenticator:
    """What tells who asks, by the methods that --auth allows. JWT is loaded only when it is used. Raises ConfigError."""
    verifier: TokenVerifier | None = None
    if "jwt" in config.auth_methods:
        from penstock.serving.gateway.security.jwt_verifier import build_verifier

        verifier = build_verifier(config)
    scrape_token = None
    if config.metrics_token_file is not None:
        scrape_token = read_secret("metrics_token_file", config.metrics_token_file, min_bytes=_MIN_SCRAPE_TOKEN_BYTES)
    return Authenticator(
        keys if "keys" in config.auth_methods else None,
        verifier,
        FailureThrottle(),
        recorder,
        tenants=TenantTerms(tenants) if tenants is not None else None,
        scrape_token=scrape_token,
    )


def host_rules(config: GatewayConfig, host: str) -> HostRules:
    """Which Host and Origin pass: without authentication on a loopback address, only this machine's own names and pages."""
    local = not config.auth_methods and is_loopback(host)
    allowed = frozenset(filter(None, (name.strip().lower() for name in config.allowed_hosts.split(","))))
    for name in allowed:
        if "/" in name or (":" in name and not name.startswith("[")) or "*" in name.removeprefix("*"):
            raise ConfigError(
                f"--allowed-hosts takes names without scheme and port such as api.example.com, not {name!r}."
            )
    return HostRules(allowed=allowed, loopback=local, same_origin=local, origins=parse_origins(config.cors_origins))


def parse_origins(text: str) -> frozenset[str]:
    """Origins separated by commas, as browsers send them. Raises ConfigError."""
    origins = frozenset(filter(None, (part.strip() for part in text.split(","))))
    for origin in origins:
        scheme, separator, rest = origin.partition("://")
        if origin != "*" and not (separator and scheme and rest and "/" not in rest and "*" not in rest):
            raise ConfigError(f"--cors-origins takes origins such as https://app.example.com, or *, not {origin!r}.")
    return origins
