"""Which route needs what: default deny, on the raw path, whatever the spelling, the Host or the method."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import Response

from penstock.core.errors import ConfigError
from penstock.serving.gateway.identity import ANONYMOUS
from penstock.serving.gateway.security.routes import RouteTable
from tests.serving.gateway.security.asgi_client import Secured, ask, bearer

PUBLIC = ("/health", "/health/live", "/health/ready", "/console/", "/console/index.html", "/console/js/a-1.min.js")
PROTECTED = (
    "/",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/tokenize",
    "/v1/engine/limits",
    "/version",
    "/openapi.json",
    "/metrics",
    "/admin/keys",
    "/console",
    "/nowhere",
)


async def test_only_liveness_readiness_and_the_console_are_public() -> None:
    secured = Secured(auth="keys")
    for path in PUBLIC:
        for method in ("GET", "HEAD"):
            assert (await ask(secured.app, path, method=method)).status == 200
            assert secured.echo.identity is ANONYMOUS
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get", "CONNECT"):
            assert (await ask(secured.app, path, method=method)).status == 401
    reached = len(secured.echo.scopes)
    for path in PROTECTED:
        for method in ("GET", "HEAD", "POST", "OPTIONS", "DELETE", "BREW"):
            assert (await ask(secured.app, path, method=method)).status == 401, path
    assert len(secured.echo.scopes) == reached


@pytest.mark.parametrize(
    "path",
    [
        "/health/",
        "//health",
        "/health//live",
        "/Health",
        "/health%2flive",
        "/health%2Flive",
        "/%68ealth",
        "/health;x",
        "/health/live/..",
        "/health/../v1/models",
        "/console/../v1/models",
        "/console/%2e%2e/v1/models",
        "/console/..%2fv1/models",
        "/console//v1/models",
        "/console/.git/config",
        "/console/a%00",
        "/console/a\\..\\b",
        "/consolex",
        "/console/" + "a" * 600,
        "/./health",
        "/health\t",
        "*",
        "",
        "http://localhost/health",
    ],
)
async def test_other_spellings_of_a_public_path_are_not_public(path: str) -> None:
    secured = Secured(auth="keys")
    assert (await ask(secured.app, path)).status == 401
    assert secured.echo.scopes == []


async def test_neither_host_nor_prefix_headers_move_a_path() -> None:
    secured = Secured(auth="keys")
    for host in (b"localhost/health", b"localhost/health?", b"localhost/console/#", b"health", b"localhost:80@x"):
        answer = await ask(secured.app, "/v1/models", host=host)
        assert answer.status in (400, 401)
    for name in (
        b"x-original-url",
        b"x-rewrite-url",
        b"x-forwarded-prefix",
        b"x-forwarded-path",
        b"x-http-method-override",
    ):
        assert (await ask(secured.app, "/v1/models", [(name, b"/health")])).status == 401
    assert secured.echo.scopes == []


ALPHABET = st.sampled_from(
    [
        "/",
        "//",
        ".",
        "..",
        "%2f",
        "%2e",
        "%25",
        "%00",
        "\\",
        ";",
        "?",
        "#",
        " ",
        "a",
        "health",
        "console",
        "metrics",
        "v1",
        "admin",
        "é",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from((*PUBLIC, *PROTECTED)), st.lists(st.tuples(st.integers(0, 40), ALPHABET), max_size=4), st.booleans()
)
async def test_no_mutation_of_a_path_opens_what_is_closed(base: str, edits: list[tuple[int, str]], upper: bool) -> None:
    """What the router behind would see decides: only a path that is public letter by letter passes without a key."""
    path = base
    for position, piece in edits:
        path = path[:position] + piece + path[position:]
    path = path.upper() if upper else path
    secured = Secured(auth="keys")
    answer = await ask(secured.app, path)
    if answer.status == 200:
        seen = secured.echo.scopes[0]["path"]
        assert seen == path.partition("?")[0]
        assert seen in PUBLIC or (seen.startswith("/console/") and "/." not in seen and "//" not in seen)
    else:
        assert answer.status == 401
        assert secured.echo.scopes == []


async def test_every_route_of_an_application_needs_a_key() -> None:
    """With a real router behind: without a key no handler ever runs, whatever the spelling; with one the same paths work."""
    app = FastAPI(redirect_slashes=False)

    async def handler() -> Response:
        return Response("{}")

    for path in PROTECTED:
        if path.startswith("/v1") or path in ("/version", "/metrics"):
            app.add_api_route(path, handler, methods=["GET"])
    secured = Secured(auth="keys", app=app)
    token = secured.directory.add(role="admin")
    paths = [route.path for route in app.routes if hasattr(route, "path")]
    assert len(paths) > 6
    for path in paths:
        for spelling in (path, path + "/", "/" + path, path.upper(), path.replace("/", "%2f"), "/x/.." + path):
            assert (await ask(secured.app, spelling)).status == 401
        assert (await secured.get(path, token)).status == 200


async def test_the_root_path_is_cut_off_as_the_router_does() -> None:
    secured = Secured(auth="keys")
    assert (await ask(secured.app, "/health", root_path="/api")).status == 200
    for path in ("/v1/models", "/../health", "/api/health", "//health"):
        assert (await ask(secured.app, path, root_path="/api")).status == 401
    token = secured.directory.add()
    assert (await secured.get("/v1/models", token, root_path="/api")).status == 200


def test_a_server_that_gives_no_raw_path() -> None:
    table = RouteTable()
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/health"}
    assert table.need_of(scope) == "public"
    assert table.need_of({**scope, "path": "/healthz"}) == "identity"


async def test_what_the_operator_opens() -> None:
    secured = Secured(auth="keys", open_routes="/v1/models, /version")
    token = secured.directory.add("acme")
    for path in ("/v1/models", "/version"):
        assert (await secured.get(path)).status == 200
        assert secured.echo.identity is ANONYMOUS
        assert (await secured.get(path, token)).status == 200
        assert secured.echo.identity.tenant == "acme"
        assert (await secured.get(path, token + "x")).status == 401
    for path in ("/v1/models/", "/v1/models/x", "/v1%2fmodels", "/V1/models", "/versions"):
        assert (await secured.get(path)).status == 401


@pytest.mark.parametrize(
    "routes", ["v1/models", "/a//b", "/a/../b", "/a b", "/admin", "/admin/keys", "/v1/*", "/a%20b"]
)
def test_what_cannot_be_opened(routes: str) -> None:
    with pytest.raises(ConfigError, match="--open-routes"):
        Secured(auth="keys", open_routes=routes)


async def test_admin_routes_need_an_admin_and_are_off_until_there_is_one() -> None:
    secured = Secured(auth="keys")
    user = secured.directory.add("acme")
    for path in ("/admin", "/admin/", "/admin/keys", "/admin/keys/x", "/%61dmin/keys"):
        assert (await secured.get(path)).status == 401
        answer = await secured.get(path, user)
        assert (answer.status, answer.code) == (404, "not_found")
    admin = secured.directory.add("ops", "admin")
    for path in ("/admin/keys", "/%61dmin/keys"):
        answer = await secured.get(path, user)
        assert (answer.status, answer.code) == (403, "permission_denied")
        assert (await secured.get(path, admin)).status == 200
        assert (await secured.get(path)).status == 401
    assert secured.failures("role") == 2
    assert (await secured.get("/administrator", user)).status == 200


async def test_without_authentication_everything_but_admin_is_served() -> None:
    secured = Secured(auth="none", host="127.0.0.1")
    secured.directory.add("ops", "admin")
    for path in (*PUBLIC, "/v1/models", "/metrics", "/version"):
        assert (await secured.get(path)).status == 200
        assert secured.echo.identity is ANONYMOUS
    for path in ("/admin", "/admin/keys", "/%61dmin/keys"):
        assert (await secured.get(path)).status == 404
    # A key that nobody asked for is nobody's business.
    assert (await secured.get("/v1/models", "anything")).status == 200


async def test_websockets_need_an_identity_too() -> None:
    secured = Secured(auth="keys")
    token = secured.directory.add()
    for path in ("/v1/realtime", "/health", "/metrics", "/console/"):
        assert (await ask(secured.app, path, kind="websocket")).status == 403
    assert secured.echo.scopes == []
    assert (await ask(secured.app, "/v1/realtime", bearer(token), kind="websocket")).status == 101


async def test_the_server_own_messages_pass() -> None:
    secured = Secured(auth="keys")

    async def unused(*_: Any) -> Any:
        raise AssertionError

    await secured.app({"type": "lifespan"}, unused, unused)
    assert [scope["type"] for scope in secured.echo.scopes] == ["lifespan"]


@pytest.mark.parametrize("auth", ["keys", "none"])
async def test_metrics_take_a_token_of_their_own(auth: str, tmp_path: Any) -> None:
    path = tmp_path / "token"
    path.write_text("scrape-token-0123456789\n")
    secured = Secured(auth=auth, metrics_token_file=str(path))
    user, admin = secured.directory.add("acme"), secured.directory.add("ops", "admin")
    assert (await secured.get("/metrics", "scrape-token-0123456789")).status == 200
    for wrong in (None, "scrape-token-012345678", "scrape-token-0123456789x", ""):
        answer = await secured.get("/metrics", wrong)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    if auth == "keys":
        assert (await secured.get("/metrics", admin)).status == 200
        assert (await secured.get("/metrics", user)).status == 403
        # It opens nothing else.
        for other in ("/v1/models", "/admin/keys", "/metrics/", "/Metrics"):
            assert (await secured.get(other, "scrape-token-0123456789")).status == 401
        assert (await ask(secured.app, "/metrics", bearer("scrape-token-0123456789"), method="POST")).status == 401


async def test_metrics_without_a_token_need_an_admin() -> None:
    secured = Secured(auth="keys")
    user, admin = secured.directory.add("acme"), secured.directory.add("ops", "admin")
    statuses = [(await secured.get("/metrics", key)).status for key in (None, user, admin)]
    assert statuses == [401, 403, 200]


def test_a_token_that_can_be_guessed_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "token"
    path.write_text("short")
    with pytest.raises(ConfigError, match=r"--metrics-token-file.*at least 16"):
        Secured(auth="keys", metrics_token_file=str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        Secured(auth="keys", metrics_token_file=str(tmp_path / "none"))
