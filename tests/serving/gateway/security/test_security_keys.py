"""API keys at the door: where they may stand, what is refused and how it is said, and that time and text tell nothing."""

from __future__ import annotations

import hmac
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import StoreUnavailableError
from penstock.serving.gateway.accounts import keys as key_format
from penstock.serving.gateway.accounts.keys import new_key, parse_key
from tests.serving.gateway.security.asgi_client import Headers, Secured, ask, bearer


@pytest.fixture
def secured() -> Secured:
    return Secured(auth="keys")


async def test_a_key_gives_its_identity(secured: Secured) -> None:
    token = secured.directory.add("acme")
    headers: list[Headers] = [
        bearer(token),
        [(b"authorization", b"bearer   " + token.encode())],
        [(b"x-api-key", token.encode())],
        [*bearer(token), (b"x-api-key", token.encode())],
    ]
    for each in headers:
        assert (await ask(secured.app, "/v1/models", each)).status == 200
        assert secured.echo.identity.tenant == "acme"
        assert secured.echo.identity.method == "key"


async def test_a_secret_that_the_operator_brought_along(secured: Secured) -> None:
    secret = "correct.horse.battery.staple/0123456789"
    parsed = parse_key(secret)
    assert parsed is not None
    secured.directory.add_secret(parsed.key_id, secret)
    assert (await secured.get("/v1/models", secret)).status == 200
    assert (await secured.get("/v1/models", secret + "x")).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Basic dXNlcjpwYXNz")],
        [(b"authorization", b"KEY")],
        [(b"authorization", b"Bearer KEY KEY")],
        [(b"authorization", b"Bearer KEY"), (b"authorization", b"Bearer KEY")],
        [(b"x-api-key", b"KEY"), (b"x-api-key", b"KEY")],
        [(b"authorization", b"Bearer KEY"), (b"x-api-key", b"other")],
        [(b"authorization", b"Bearer KEY"), (b"x-api-key", b"")],
        [(b"x-api-key", b"Bearer KEY")],
        [(b"x-api-key", b"KEY\xe9")],
        [(b"authorization", "Bearer KEY\u00e9".encode())],
        [(b"authorization", b"Bearer KEY\x00")],
        [(b"x-api-key", b"KEY" + b"a" * 9000)],
        [(b"x-api-key", b"KEY" + b"a" * 1000)],
        [(b"cookie", b"key=KEY")],
        [(b"proxy-authorization", b"Bearer KEY")],
    ],
)
async def test_anything_else_is_refused_alike(secured: Secured, headers: Headers) -> None:
    token = secured.directory.add().encode()
    answer = await ask(secured.app, "/v1/models", [(name, value.replace(b"KEY", token)) for name, value in headers])
    reference = await ask(secured.app, "/v1/models")
    assert (answer.status, answer.body) == (401, reference.body)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"
    assert secured.echo.scopes == []


PIECES = (
    "KEY",
    "Bearer KEY",
    "bearer KEY",
    "BEARER  KEY",
    "Bearer",
    "Bearer KEY, Bearer KEY",
    "Basic KEY",
    "KEY,KEY",
    "",
    "x",
)
GOOD_AUTHORIZATION = ("Bearer KEY", "bearer KEY", "BEARER  KEY")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(("authorization", "x-api-key", "x_api_key", "api-key", "cookie")), st.sampled_from(PIECES)
        ),
        max_size=4,
    )
)
async def test_no_mixture_of_headers_confuses_it(pairs: list[tuple[str, str]]) -> None:
    """A request passes exactly when every header that can hold a credential is there at most once and holds the same good one."""
    secured = Secured(auth="keys")
    token = secured.directory.add()
    headers = [(name.encode(), value.replace("KEY", token).encode()) for name, value in pairs]
    authorization = [value for name, value in pairs if name == "authorization"]
    api_key = [value for name, value in pairs if name == "x-api-key"]
    passes = (
        len(authorization) <= 1
        and len(api_key) <= 1
        and len(authorization) + len(api_key) > 0
        and all(value in GOOD_AUTHORIZATION for value in authorization)
        and all(value == "KEY" for value in api_key)
    )
    assert (await ask(secured.app, "/v1/models", headers)).status == (200 if passes else 401)


async def test_a_key_in_the_query_is_no_key(secured: Secured) -> None:
    token = secured.directory.add()
    assert (await secured.get(f"/v1/models?api_key={token}&key={token}")).status == 401


async def test_wrong_unknown_revoked_and_expired_keys_are_answered_alike(secured: Secured) -> None:
    good = secured.directory.add()
    tokens = [
        good[:-1] + ("A" if good[-1] != "A" else "B"),
        new_key().token,
        secured.directory.add(usable=False),
        secured.directory.add(expires_at=1.0),
        "psk_short",
        good.upper(),
        "' OR 1=1 --",
    ]
    answers = {(await secured.get("/v1/models", token.replace(" ", "+"))).body for token in tokens}
    assert len(answers) == 1
    assert secured.failures("key") == len(tokens)
    assert (await secured.get("/v1/models", good)).status == 200


async def test_known_and_unknown_ids_cost_the_same_comparisons(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timing class: not milliseconds, which a busy machine blurs, but what is done."""
    calls: list[tuple[int, int]] = []
    hashed: list[int] = []
    real_compare, real_hash = hmac.compare_digest, key_format.hash_secret

    def counting(a: Any, b: Any) -> bool:
        calls.append((len(a), len(b)))
        return real_compare(a, b)

    def counting_hash(secret: str) -> bytes:
        hashed.append(len(secret))
        return real_hash(secret)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    monkeypatch.setattr(key_format, "hash_secret", counting_hash)
    good = secured.directory.add()
    unusable = secured.directory.add(usable=False)
    seen = set()
    for token in (good, good[:-1] + "_", new_key().token, unusable):
        calls.clear()
        hashed.clear()
        finds = secured.directory.finds
        await secured.get("/v1/models", token)
        seen.add((tuple(calls), tuple(hashed), secured.directory.finds - finds))
    assert seen == {(((32, 32),), (43,), 1)}


async def test_a_database_that_is_away_is_no_failed_attempt(secured: Secured) -> None:
    token = secured.directory.add()
    secured.directory.failure = StoreUnavailableError("The database is not available. Retry shortly.")
    for _ in range(100):
        answer = await secured.get("/v1/models", token)
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "store_unavailable", "1")
    secured.directory.failure = None
    assert (await secured.get("/v1/models", token)).status == 200


async def test_nothing_secret_is_logged_or_said(secured: Secured, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    good = secured.directory.add()
    wrong = new_key().token
    revoked = secured.directory.add(usable=False)
    bodies = b""
    for token in (good, wrong, revoked, "plain-secret-of-somebody-0123456789-0123"):
        for headers in (bearer(token), [(b"x-api-key", token.encode())], bearer(token) * 2):
            bodies += (await ask(secured.app, "/v1/chat/completions", headers, method="POST")).body
    said = caplog.text + bodies.decode() + repr([record.__dict__ for record in caplog.records])
    for token in (good, wrong, revoked):
        assert token[21:] not in said
    assert "plain-secret" not in said


async def test_keys_are_not_looked_at_when_only_tokens_are_allowed(tmp_path: Any) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s" * 32)
    secured = Secured(auth="jwt", jwt_algorithm="HS256", jwt_secret_file=str(secret))
    token = secured.directory.add()
    assert (await secured.get("/v1/models", token)).status == 401
    assert secured.directory.finds == 0
