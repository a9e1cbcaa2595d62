"""Decided before the port opens: which authentication holds, and whether this server may be reached from outside."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from penstock.core.config import flag_name
from penstock.core.errors import ConfigError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.security.addresses import is_loopback

logger = logging.getLogger(__name__)

CREATE_KEY_COMMAND = "penstock keys create --tenant NAME --role admin"
_MAX_SECRET_FILE_BYTES = 64 * 1024


def resolve_auth(config: GatewayConfig, host: str) -> GatewayConfig:
    """`config` with 'auto' replaced: none where only this machine can ask, keys elsewhere."""
    if config.auth != "auto":
        return config
    return dataclasses.replace(config, auth="none" if is_loopback(host) else "keys")


def check_exposed(config: GatewayConfig, host: str, has_keys: bool) -> None:
    """Raise ConfigError when nobody could use this server or everybody could without that having been asked for.

    `config` comes from `resolve_auth`; `has_keys`: a usable key exists (after --admin-key-file has become one).
    """
    check_jwt(config)
    methods = config.auth_methods
    if not methods:
        if not is_loopback(host):
            logger.warning("--auth none on %s: everybody who reaches this address can use all of the server", host)
        return
    if has_keys or config.admin_key_file or "jwt" in methods:
        return
    if is_loopback(host):
        logger.warning("there is no API key yet, so every request is refused; make one: %s", CREATE_KEY_COMMAND)
        return
    raise ConfigError(
        f"{host} can be reached from other machines and there is no API key. Make one: {CREATE_KEY_COMMAND} "
        "(or give --admin-key-file, --auth jwt, or, for everybody, --auth none)."
    )


def check_jwt(config: GatewayConfig) -> None:
    """Raise ConfigError when JWT is asked for and what verifies it is not given."""
    if "jwt" not in config.auth_methods:
        return
    if config.jwt_algorithm == "HS256":
        if not config.jwt_secret_file:
            raise ConfigError("--jwt-algorithm HS256 needs --jwt-secret-file.")
    elif not config.jwt_jwks:
        raise ConfigError(f"--auth {config.auth} with --jwt-algorithm {config.jwt_algorithm} needs --jwt-jwks.")


def read_secret(setting: str, path: str, *, min_bytes: int) -> bytes:
    """The secret that a file holds. A line end behind printable text is the editor's, not the secret's; binary secrets are taken
    as they are. Raises ConfigError, which names the setting and the file and never the content."""
    flag = flag_name(setting)
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_SECRET_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}.") from None
    if len(content) > _MAX_SECRET_FILE_BYTES:
        raise ConfigError(f"{flag}: {path} is larger than {_MAX_SECRET_FILE_BYTES} bytes.")
    text = content.rstrip(b"\r\n")
    secret = text if text.isascii() and text.decode("ascii").isprintable() else content
    if len(secret) < min_bytes:
        raise ConfigError(f"{flag}: the secret in {path} has {len(secret)} bytes; at least {min_bytes} are needed.")
    return secret
