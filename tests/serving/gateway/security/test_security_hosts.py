"""Host, Origin, CORS and proxies: DNS rebinding, cross-site requests to a keyless server, and addresses that clients make up."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.errors import ConfigError
from penstock.serving.gateway.identity import ANONYMOUS
from tests.serving.gateway.security.asgi_client import Headers, Secured, ask, bearer


def keyless(**settings: Any) -> Secured:
    return Secured(host="127.0.0.1", **settings)


@pytest.mark.parametrize(
    "host",
    [
        b"localhost",
        b"localhost:8000",
        b"LOCALHOST:1",
        b"app.localhost:8000",
        b"localhost.:8000",
        b"127.0.0.1",
        b"127.0.0.1:8000",
        b"127.8.9.1:8000",
        b"[::1]",
        b"[::1]:8000",
    ],
)
async def test_names_of_this_machine_are_served(host: bytes) -> None:
    assert (await ask(keyless().app, "/v1/models", host=host)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"evil.example:8000",
        b"localhost.evil.example",
        b"127.0.0.1.evil.example",
        b"127.0.0.1.nip.io:8000",
        b"evil-localhost",
        b"0.0.0.0:8000",
        b"[::]:8000",
        b"192.168.1.2:8000",
        b"2130706433",
        b"127.1",
        b"[2001:db8::1]",
        b"host.docker.internal:8000",
    ],
)
async def test_a_name_that_was_rebound_is_refused(host: bytes) -> None:
    secured = keyless()
    for path in ("/v1/models", "/health", "/metrics", "/console/"):
        answer = await ask(secured.app, path, host=host)
        assert (answer.status, answer.code) == (403, "host_not_allowed")
        assert "--allowed-hosts" in answer.json()["error"]["message"]
    assert secured.echo.scopes == []
    assert (await ask(secured.app, "/ws", host=host, kind="websocket")).status == 403


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"host", b"")],
        [(b"host", b"localhost"), (b"host", b"localhost")],
        [(b"host", b"localhost"), (b"host", b"evil.example")],
        [(b"host", b"localhost evil.example")],
        [(b"host", b"localhost:port")],
        [(b"host", b"localhost@evil.example")],
        [(b"host", b"localhost/x")],
        [(b"host", b"localhost,evil.example")],
        [(b"host", "l\u00f6calhost".encode())],
        [(b"host", b"a" * 300)],
    ],
)
@pytest.mark.parametrize("exposed", [True, False])
async def test_exactly_one_valid_host(headers: Headers, exposed: bool) -> None:
    secured = Secured(auth="keys") if exposed else keyless()
    answer = await ask(secured.app, "/health", headers, host=None)
    assert (answer.status, answer.code) == (400, "invalid_host")


async def test_http_1_0_has_no_host_and_is_served_where_no_name_matters() -> None:
    assert (await ask(Secured(auth="keys").app, "/health", host=None, http_version="1.0")).status == 200
    assert (await ask(keyless().app, "/health", host=None, http_version="1.0")).status == 400


async def test_allowed_hosts_hold_always() -> None:
    local = keyless(allowed_hosts="host.docker.internal")
    for host, status in ((b"host.docker.internal:8000", 200), (b"localhost:8000", 200), (b"evil.example", 403)):
        assert (await ask(local.app, "/v1/models", host=host)).status == status
    exposed = Secured(auth="keys", allowed_hosts="api.example.com, *.internal, [2001:db8::1]")
    token = exposed.directory.add()
    for host, status in (
        (b"api.example.com", 200),
        (b"API.example.com:443", 200),
        (b"a.b.internal", 200),
        (b"internal", 403),
        (b"notinternal", 403),
        (b"localhost", 403),
        (b"x.api.example.com", 403),
        (b"[2001:db8::1]:8000", 200),
    ):
        assert (await ask(exposed.app, "/v1/models", bearer(token), host=host)).status == status, host


async def test_with_keys_or_elsewhere_any_name_is_served() -> None:
    secured = Secured(auth="keys", host="127.0.0.1")
    assert (await ask(secured.app, "/health", host=b"any.example")).status == 200
    assert (await ask(Secured(auth="none").app, "/v1/models", host=b"any.example")).status == 200


@pytest.mark.parametrize("hosts", ["https://api.example.com", "api.example.com:443", "a/b", "a*.example.com"])
def test_host_rules_that_could_never_match(hosts: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-hosts"):
        Secured(auth="keys", allowed_hosts=hosts)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (b"https://evil.example", 403),
        (b"http://localhost:3000", 403),
        (b"http://localhost.evil.example:8000", 403),
        (b"null", 403),
        (b"", 403),
        (b"http://localhost:bad", 403),
        (b"file://", 403),
        (b"http://localhost:8000", 200),
        (b"http://app.example:5173", 200),
        (b"http://app.example", 403),
    ],
)
async def test_pages_of_other_sites_cannot_change_anything(origin: bytes, status: int) -> None:
    secured = keyless(cors_origins="http://app.example:5173")
    for method in ("POST", "PATCH", "DELETE"):
        answer = await ask(secured.app, "/v1/chat/completions", [(b"origin", origin)], method=method)
        assert answer.status == status
        if status == 403:
            assert answer.code == "origin_not_allowed"
    # Reading is harmless: without CORS the page does not get to see the answer.
    answer = await ask(secured.app, "/v1/models", [(b"origin", origin)])
    assert answer.status == 200
    assert answer.headers.get("access-control-allow-origin") in (None, "http://app.example:5173")
    websocket = await ask(secured.app, "/v1/realtime", [(b"origin", origin)], kind="websocket")
    assert websocket.status == (101 if status == 200 else 403)


async def test_programs_send_no_origin_and_default_ports_are_understood() -> None:
    secured = keyless()
    assert (await ask(secured.app, "/v1/completions", method="POST")).status == 200
    for host, origin, scheme in (
        (b"localhost", b"http://localhost", "http"),
        (b"localhost", b"https://localhost", "https"),
        # A proxy took the TLS off.
        (b"localhost", b"https://localhost", "http"),
        (b"localhost:443", b"https://localhost", "http"),
        (b"localhost:80", b"http://localhost", "http"),
        (b"[::1]:8000", b"http://[::1]:8000", "http"),
    ):
        headers = [(b"origin", origin)]
        assert (await ask(secured.app, "/v1/x", headers, method="POST", host=host, scheme=scheme)).status == 200, host
    two = [(b"origin", b"http://localhost:8000"), (b"origin", b"https://evil.example")]
    assert (await ask(secured.app, "/v1/x", two, method="POST")).status == 403


async def test_origins_do_not_matter_where_a_key_is_needed() -> None:
    """A page of another site has no key that a browser would send by itself."""
    secured = Secured(auth="keys")
    headers = [(b"origin", b"https://evil.example"), *bearer(secured.directory.add())]
    assert (await ask(secured.app, "/v1/x", headers, method="POST")).status == 200
    assert (await ask(secured.app, "/v1/x", headers[:1], method="POST")).status == 401


def preflight(
    origin: bytes, method: bytes = b"POST", names: bytes = b"authorization,content-type,x-stainless-os"
) -> Headers:
    return [
        (b"origin", origin),
        (b"access-control-request-method", method),
        (b"access-control-request-headers", names),
    ]


async def test_cors_is_off_unless_configured() -> None:
    secured = Secured(auth="keys")
    answer = await ask(secured.app, "/v1/models", preflight(b"https://app.example"), method="OPTIONS")
    assert answer.status == 401
    token = secured.directory.add()
    for headers in (bearer(token), []):
        answer = await ask(secured.app, "/v1/models", [(b"origin", b"https://app.example"), *headers])
        assert not any(name.startswith("access-control") for name in answer.headers)


async def test_cors_for_the_origins_that_are_named() -> None:
    secured = Secured(auth="keys", cors_origins="https://app.example, http://localhost:5173")
    for origin in (b"https://app.example", b"http://localhost:5173"):
        answer = await ask(secured.app, "/v1/chat/completions", preflight(origin), method="OPTIONS")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, origin.decode())
        assert "access-control-allow-credentials" not in answer.headers
    for origin in (b"https://evil.example", b"https://app.example.evil.example", b"null", b"http://app.example"):
        answer = await ask(secured.app, "/v1/chat/completions", preflight(origin), method="OPTIONS")
        assert answer.status == 400
        assert "access-control-allow-origin" not in answer.headers
    # Also a refusal can be read by the page, so that its program can say what is wrong.
    answer = await ask(secured.app, "/v1/models", [(b"origin", b"https://app.example")])
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, "https://app.example")
    exposed = answer.headers["access-control-expose-headers"].lower()
    for name in ("x-request-id", "x-penstock-cache", "retry-after-ms", "x-ratelimit-remaining-tokens"):
        assert name in exposed
    assert len(secured.echo.scopes) == 0


async def test_any_origin_without_cookies() -> None:
    secured = Secured(auth="keys", cors_origins="*")
    token = secured.directory.add()
    answer = await ask(secured.app, "/v1/models", [(b"origin", b"https://any.example"), *bearer(token)])
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origins", ["app.example", "https://app.example/", "https://*.example", "null", "https://"])
def test_origins_that_no_browser_sends(origins: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origins"):
        Secured(auth="keys", cors_origins=origins)


def forwarded(*values: bytes, proto: bytes | None = None) -> Headers:
    headers = [(b"x-forwarded-for", value) for value in values]
    return headers + ([(b"x-forwarded-proto", proto)] if proto is not None else [])


async def client_seen(
    headers: Headers, peer: str | None, allow: str = "10.0.0.0/8,192.0.2.7,2001:db8::/32"
) -> tuple[Any, str]:
    secured = Secured(auth="none", forwarded_allow_ips=allow)
    assert (await ask(secured.app, "/v1/models", headers, client=peer)).status == 200
    scope = secured.echo.scopes[0]
    return scope["client"] and scope["client"][0], scope["scheme"]


@pytest.mark.parametrize(
    ("headers", "peer", "client"),
    [
        # Not from a proxy: the client's own words.
        (forwarded(b"1.1.1.1"), "203.0.113.9", "203.0.113.9"),
        (forwarded(b"1.1.1.1"), "192.0.2.8", "192.0.2.8"),
        (forwarded(b"1.1.1.1"), None, None),
        (forwarded(b"1.1.1.1"), "unix:", "unix:"),
        # The rightmost that is not a proxy.
        (forwarded(b"1.1.1.1"), "10.1.2.3", "1.1.1.1"),
        (forwarded(b"6.6.6.6, 1.1.1.1"), "10.1.2.3", "1.1.1.1"),
        (forwarded(b"6.6.6.6, 1.1.1.1, 10.9.9.9"), "192.0.2.7", "1.1.1.1"),
        (forwarded(b"6.6.6.6", b"1.1.1.1"), "10.1.2.3", "1.1.1.1"),
        (forwarded(b"127.0.0.1, 1.1.1.1"), "10.1.2.3", "1.1.1.1"),
        (forwarded(b"10.5.5.5, 10.6.6.6"), "10.1.2.3", "10.5.5.5"),
        (forwarded(b"1.1.1.1:4711"), "10.1.2.3", "1.1.1.1"),
        (forwarded(b"[2001:db9::1]:4711"), "2001:db8::5", "2001:db9::1"),
        (forwarded(b"2001:db9::1"), "2001:db8::5", "2001:db9::1"),
        (forwarded(b"1.1.1.1"), "::ffff:10.1.2.3", "1.1.1.1"),
        # What is no address is not believed, nor what stands left of it.
        (forwarded(b"evil\x1b[2J"), "10.1.2.3", "10.1.2.3"),
        (forwarded(b""), "10.1.2.3", "10.1.2.3"),
        (forwarded(b"6.6.6.6, unknown"), "10.1.2.3", "10.1.2.3"),
        (forwarded(b"6.6.6.6, unknown, 10.2.2.2"), "10.1.2.3", "10.2.2.2"),
        (forwarded(b"6.6.6.6," * 5000), "10.1.2.3", "10.1.2.3"),
        ([(b"forwarded", b"for=1.1.1.1"), (b"x-real-ip", b"1.1.1.1")], "10.1.2.3", "10.1.2.3"),
    ],
)
async def test_whose_address_counts(headers: Headers, peer: str | None, client: str | None) -> None:
    assert (await client_seen(headers, peer))[0] == client


@pytest.mark.parametrize(
    ("proto", "peer", "scheme"),
    [
        (b"https", "10.1.2.3", "https"),
        (b"HTTPS", "10.1.2.3", "https"),
        (b"https", "203.0.113.9", "http"),
        (b"javascript", "10.1.2.3", "http"),
        (b"https, http", "10.1.2.3", "http"),
    ],
)
async def test_whose_scheme_counts(proto: bytes, peer: str, scheme: str) -> None:
    assert (await client_seen(forwarded(proto=proto), peer))[1] == scheme


async def test_without_the_setting_nobody_is_believed() -> None:
    assert await client_seen(forwarded(b"1.1.1.1", proto=b"https"), "127.0.0.1", "") == ("127.0.0.1", "http")


async def test_made_up_addresses_do_not_escape_the_throttle() -> None:
    secured = Secured(auth="keys", forwarded_allow_ips="10.0.0.0/8")
    for number in range(20):
        headers = [*forwarded(f"1.1.1.{number}".encode()), *bearer("psk_wrong")]
        answer = await ask(secured.app, "/v1/models", headers)
    assert answer.status == 429
    # Through the proxy, the real clients are told apart.
    headers = [*forwarded(b"9.9.9.9, 203.0.113.77"), *bearer("psk_wrong")]
    assert (await ask(secured.app, "/v1/models", headers, client="10.0.0.1")).status == 401


@pytest.mark.parametrize("networks", ["*", "proxy.example", "10.0.0.1/8", "10.0.0.0/40"])
def test_a_proxy_that_cannot_be_understood_is_an_error(networks: str) -> None:
    with pytest.raises(ConfigError, match="--forwarded-allow-ips"):
        Secured(auth="keys", forwarded_allow_ips=networks)


async def test_auto_is_no_authentication_here_and_keys_elsewhere() -> None:
    local = Secured(host="127.0.0.1")
    assert (await ask(local.app, "/v1/models")).status == 200
    assert local.echo.identity is ANONYMOUS
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "server.example"):  # noqa: S104
        assert (await ask(Secured(host=host).app, "/v1/models")).status == 401
