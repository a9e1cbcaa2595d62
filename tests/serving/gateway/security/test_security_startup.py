"""What is decided before the port opens: authentication that fits the address, and keys that exist."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from penstock.core.config import ServerConfig
from penstock.core.errors import ConfigError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.security.build import add_security
from penstock.serving.gateway.security.startup import check_exposed, resolve_auth
from penstock.telemetry.recorder import Recorder
from tests.serving.gateway.security.asgi_client import Echo

LOOPBACK = ("127.0.0.1", "127.1.2.3", "localhost", "::1", "Localhost")
EXPOSED = ("0.0.0.0", "::", "", "192.168.1.5", "example.com", "localhost.example.com", "::ffff:10.0.0.1")  # noqa: S104


@pytest.mark.parametrize("host", LOOPBACK)
def test_on_loopback_it_just_works(host: str, caplog: pytest.LogCaptureFixture) -> None:
    config = resolve_auth(GatewayConfig(), host)
    assert config.auth == "none"
    check_exposed(config, host, has_keys=False)
    assert caplog.text == ""


@pytest.mark.parametrize("host", EXPOSED)
def test_elsewhere_it_does_not_start_without_a_key(host: str) -> None:
    config = resolve_auth(GatewayConfig(), host)
    assert config.auth == "keys"
    with pytest.raises(ConfigError, match="penstock keys create --tenant NAME --role admin") as caught:
        check_exposed(config, host, has_keys=False)
    assert "\n" not in str(caught.value)
    check_exposed(config, host, has_keys=True)
    check_exposed(resolve_auth(GatewayConfig(admin_key_file="key"), host), host, has_keys=False)
    check_exposed(
        resolve_auth(GatewayConfig(auth="jwt", jwt_jwks="https://id.example/jwks"), host), host, has_keys=False
    )
    check_exposed(resolve_auth(GatewayConfig(auth="keys,jwt", jwt_jwks="jwks.json"), host), host, has_keys=False)


def test_open_to_everybody_only_when_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = resolve_auth(GatewayConfig(auth="none"), "0.0.0.0")  # noqa: S104
    assert config.auth == "none"
    check_exposed(config, "0.0.0.0", has_keys=False)  # noqa: S104
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "--auth none on 0.0.0.0" in caplog.text


def test_keys_asked_for_on_loopback_start_with_a_hint(caplog: pytest.LogCaptureFixture) -> None:
    config = resolve_auth(GatewayConfig(auth="keys"), "127.0.0.1")
    assert config.auth == "keys"
    check_exposed(config, "127.0.0.1", has_keys=False)
    assert "penstock keys create" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
def test_jwt_without_what_verifies_it(host: str) -> None:
    for config, message in (
        (GatewayConfig(auth="jwt"), "--auth jwt with --jwt-algorithm RS256 needs --jwt-jwks"),
        (GatewayConfig(auth="keys,jwt", jwt_algorithm="ES256", jwt_secret_file="f"), "needs --jwt-jwks"),
        (GatewayConfig(auth="jwt", jwt_algorithm="HS256", jwt_jwks="f"), "needs --jwt-secret-file"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_exposed(config, host, has_keys=True)


def test_keys_need_a_directory() -> None:
    with pytest.raises(ConfigError, match="--auth keys"):
        add_security(Echo(), GatewayConfig(), ServerConfig(host="0.0.0.0"), None, Recorder())  # noqa: S104


def test_what_is_not_used_is_not_loaded() -> None:
    code = """
from penstock.core.config import ServerConfig
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.security.build import add_security
from penstock.telemetry.recorder import Recorder
add_security(None, GatewayConfig(), ServerConfig(), None, Recorder())
import sys
print(*[name for name in ("jwt", "cryptography", "httpx", "sqlalchemy", "alembic", "redis") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == []
