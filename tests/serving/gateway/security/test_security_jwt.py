"""JSON Web Tokens: one algorithm, one source of keys, claims that are checked, and nothing that the token itself can choose."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from penstock.core.errors import ConfigError
from penstock.serving.gateway.identity import RateLimits
from penstock.serving.gateway.security import jwt_verifier
from penstock.serving.gateway.security.jwks import Jwks
from penstock.serving.gateway.security.jwt_verifier import JwtVerifier, SharedSecret
from tests.serving.gateway.security.asgi_client import Secured, ask

SECRET = "0123456789abcdef0123456789abcdef"
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def public_jwk(key: Any, **more: Any) -> dict[str, Any]:
    algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), **more}


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims with changes; None takes one away."""
    now = int(time.time())
    merged = {"sub": "alice", "tenant": "acme", "exp": now + 600, "nbf": now - 5, "iat": now - 5, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw_token(header: Any, payload: Any, sign: Any) -> str:
    """A token as no library would make it."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)]
    signed = ".".join(base64url(part) for part in parts)
    return f"{signed}.{base64url(sign(signed.encode()))}"


def hs256(key: bytes) -> Any:
    return lambda data: hmac.new(key, data, hashlib.sha256).digest()


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    return str(path)


@pytest.fixture
def hmac_server(secret_file: str) -> Secured:
    return Secured(auth="jwt", jwt_algorithm="HS256", jwt_secret_file=secret_file)


def key_server(tmp_path: Path, *keys: dict[str, Any], algorithm: str = "RS256", **settings: Any) -> Secured:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": keys}))
    return Secured(**{"auth": "jwt", "jwt_algorithm": algorithm, "jwt_jwks": str(path), **settings})


async def status(server: Secured, token: str) -> int:
    answer = await server.get("/v1/models", token)
    if answer.status != 200:
        assert answer.body == (await ask(server.app, "/v1/models")).body
    return answer.status


async def test_a_token_gives_the_identity_of_its_claims(hmac_server: Secured) -> None:
    token = jwt.encode(
        claims(role="admin", limits={"rpm": 10, "tpm": 2000, "concurrency": 3}, models=["a", "b"], priority=5),
        SECRET,
        "HS256",
    )
    assert await status(hmac_server, token) == 200
    identity = hmac_server.echo.identity
    assert (identity.tenant, identity.key_id, identity.method, identity.role) == ("acme", "jwt:alice", "jwt", "admin")
    assert identity.key_limits == RateLimits(10, 2000, 3)
    assert identity.models == frozenset({"a", "b"})
    assert identity.priority == 5
    assert (await ask(hmac_server.app, "/v1/models", [(b"x-api-key", token.encode())])).status == 200


@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
async def test_public_keys_verify(algorithm: str, tmp_path: Path) -> None:
    key = RSA_KEY if algorithm == "RS256" else EC_KEY
    server = key_server(tmp_path, public_jwk(RSA_KEY, kid="r"), public_jwk(EC_KEY, kid="e"), algorithm=algorithm)
    kid = "r" if algorithm == "RS256" else "e"
    assert await status(server, jwt.encode(claims(), key, algorithm, headers={"kid": kid})) == 200
    # There is one key of this kind, so a token need not name it.
    assert await status(server, jwt.encode(claims(), key, algorithm)) == 200
    assert await status(server, jwt.encode(claims(), key, algorithm, headers={"kid": "x"})) == 401


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": None},
        {"exp": 1},
        {"exp": int(time.time()) - 31},
        {"exp": "soon"},
        {"exp": float("inf")},
        {"exp": True},
        {"nbf": int(time.time()) + 3600},
        {"nbf": "later"},
        {"iat": int(time.time()) + 3600},
        {"tenant": None},
        {"tenant": ""},
        {"tenant": 5},
        {"tenant": ["acme"]},
        {"tenant": "a b"},
        {"tenant": "a{b}"},
        {"tenant": "a\n"},
        {"tenant": "\u00e4cme"},
        {"tenant": "a" * 129},
        {"tenant": "../acme"},
        {"sub": 5},
        {"role": 1},
        {"role": ["admin", 1]},
        {"limits": 10},
        {"limits": {"rpm": "10"}},
        {"limits": {"rpm": 0}},
        {"limits": {"tpm": -1}},
        {"limits": {"tpm": True}},
        {"limits": {"concurrency": 1.5}},
        {"limits": {"rpm": 10**30}},
        {"models": "a"},
        {"models": [1]},
        {"models": ["m"] * 300},
    ],
)
async def test_claims_that_are_missing_or_not_understood(hmac_server: Secured, changes: dict[str, Any]) -> None:
    payload = claims(**changes)
    token = raw_token({"alg": "HS256", "typ": "JWT"}, payload, hs256(SECRET.encode()))
    assert await status(hmac_server, token) == 401
    assert hmac_server.failures("token") == 1
    assert hmac_server.echo.scopes == []


async def test_leeway_and_what_a_token_may_leave_out(hmac_server: Secured) -> None:
    now = int(time.time())
    token = jwt.encode({"tenant": "acme", "exp": now - 10, "nbf": now + 10}, SECRET, "HS256")
    assert await status(hmac_server, token) == 200
    assert await status(hmac_server, jwt.encode(claims(exp=10**400), SECRET, "HS256")) == 200
    assert await status(hmac_server, token) == 200
    identity = hmac_server.echo.identity
    assert (identity.role, identity.models, identity.priority) == ("user", None, 0)
    assert identity.key_limits == RateLimits()
    assert identity.key_id.startswith("jwt:#")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"role": "admin"}, ("admin", 0)),
        ({"role": ["viewer", "admin"]}, ("admin", 0)),
        ({"role": "Admin"}, ("user", 0)),
        ({"role": "root"}, ("user", 0)),
        ({"role": []}, ("user", 0)),
        ({"priority": -10}, ("user", 0)),
        ({"priority": "0"}, ("user", 0)),
        ({"priority": 7}, ("user", 7)),
    ],
)
async def test_a_token_cannot_put_itself_in_front(
    hmac_server: Secured, changes: dict[str, Any], expected: tuple[str, int]
) -> None:
    assert await status(hmac_server, jwt.encode(claims(**changes), SECRET, "HS256")) == 200
    assert (hmac_server.echo.identity.role, hmac_server.echo.identity.priority) == expected


async def test_strange_subjects_are_bounded_and_distinct(hmac_server: Secured) -> None:
    seen = []
    for subject in ("a", "b", "a" * 5000, "a" * 5001, "line\nbreak", "", "auth0|123", "#" + "0" * 32, None):
        assert await status(hmac_server, jwt.encode(claims(sub=subject), SECRET, "HS256")) == 200
        seen.append(hmac_server.echo.identity.key_id)
    assert len(set(seen)) == len(seen)
    assert all(len(key_id) < 64 and key_id.isprintable() for key_id in seen)


async def test_issuer_and_audience_are_required_when_configured(secret_file: str) -> None:
    server = Secured(
        auth="jwt",
        jwt_algorithm="HS256",
        jwt_secret_file=secret_file,
        jwt_issuer="https://id.example",
        jwt_audience="penstock",
    )
    good = {"iss": "https://id.example", "aud": "penstock"}
    cases: list[tuple[dict[str, Any], int]] = [
        (good, 200),
        ({**good, "aud": ["other", "penstock"]}, 200),
        ({**good, "aud": "other"}, 401),
        ({**good, "aud": []}, 401),
        ({**good, "aud": {"penstock": 1}}, 401),
        ({**good, "aud": "penstock2"}, 401),
        ({**good, "iss": "https://evil.example"}, 401),
        ({**good, "iss": ["https://id.example"]}, 401),
        ({"aud": "penstock"}, 401),
        ({"iss": "https://id.example"}, 401),
    ]
    for changes, expected in cases:
        token = raw_token({"alg": "HS256"}, claims(**changes), hs256(SECRET.encode()))
        assert await status(server, token) == expected, changes


async def test_claims_deep_in_objects_and_with_dots_in_their_names(secret_file: str) -> None:
    server = Secured(
        auth="jwt",
        jwt_algorithm="HS256",
        jwt_secret_file=secret_file,
        jwt_tenant_claim="org.id",
        jwt_role_claim="https://penstock.example/role",
        jwt_limits_claim="org.plan.limits",
    )
    payload = claims(
        tenant=None, org={"id": "acme", "plan": {"limits": {"rpm": 7}}}, **{"https://penstock.example/role": "admin"}
    )
    assert await status(server, jwt.encode(payload, SECRET, "HS256")) == 200
    identity = server.echo.identity
    assert (identity.tenant, identity.role, identity.key_limits.requests_per_minute) == ("acme", "admin", 7)
    assert await status(server, jwt.encode(claims(org="acme"), SECRET, "HS256")) == 401


async def test_a_public_key_is_no_shared_secret(tmp_path: Path) -> None:
    """The classic confusion: a token signed with HS256 and the text of the public key."""
    server = key_server(tmp_path, public_jwk(RSA_KEY))
    public = RSA_KEY.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    jwk = json.dumps(public_jwk(RSA_KEY)).encode()
    for key in (pem, pem.strip(), jwk, b""):
        for name in ("HS256", "RS256", "hs256"):
            assert await status(server, raw_token({"alg": name}, claims(), hs256(key))) == 401


async def test_the_token_never_chooses_the_algorithm(tmp_path: Path, hmac_server: Secured) -> None:
    rs256 = key_server(tmp_path, public_jwk(RSA_KEY), public_jwk(EC_KEY))
    tokens = [
        raw_token({"alg": "none"}, claims(), lambda data: b""),
        raw_token({"alg": "None"}, claims(), lambda data: b""),
        raw_token({"alg": ""}, claims(), lambda data: b""),
        raw_token({"alg": None}, claims(), lambda data: b""),
        raw_token({}, claims(), lambda data: b""),
        raw_token({"alg": ["RS256"]}, claims(), lambda data: b""),
        jwt.encode(claims(), EC_KEY, "ES256"),
        jwt.encode(claims(), RSA_KEY, "RS512"),
        jwt.encode(claims(), RSA_KEY, "PS256"),
        jwt.encode(claims(), SECRET * 2, "HS512"),
    ]
    for token in tokens:
        assert await status(rs256, token) == 401
        assert await status(hmac_server, token) == 401
    assert await status(rs256, jwt.encode(claims(), RSA_KEY, "RS256")) == 200
    assert await status(hmac_server, jwt.encode(claims(), RSA_KEY, "RS256")) == 401


async def test_a_token_never_brings_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a token made the server fetch something")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    server = key_server(tmp_path, public_jwk(RSA_KEY, kid="r"))
    headers: list[dict[str, Any]] = [
        {"jwk": public_jwk(OTHER_RSA_KEY)},
        {"jwk": public_jwk(OTHER_RSA_KEY), "kid": "r"},
        {"jku": "https://evil.example/jwks.json"},
        {"jku": "https://evil.example/jwks.json", "kid": "r"},
        {"x5u": "https://evil.example/cert.pem", "kid": "r"},
        {"x5c": ["MIIB"], "kid": "r"},
        {"kid": "../../../dev/null"},
        {"kid": "' UNION SELECT 'key"},
        {"kid": "x" * 3000},
    ]
    for header in headers:
        assert await status(server, jwt.encode(claims(), OTHER_RSA_KEY, "RS256", headers=header)) == 401


async def test_what_is_no_token_at_all(hmac_server: Secured) -> None:
    good = jwt.encode(claims(), SECRET, "HS256")
    header, payload, signature = good.split(".")
    key = hs256(SECRET.encode())
    tokens = [
        f"{header}.{payload}.",
        f"{header}.{payload}.{signature[:-2]}",
        f"{header}.{payload}.{signature}A",
        f"{header}.{payload}{'A' * 4}.{signature}",
        f"{header}..{signature}",
        f"..{signature}",
        "..",
        "a.b.c",
        f"{good}.{good}",
        f"{header}.{payload}.{signature}.{signature}.a",
        raw_token(b"[" * 3000, claims(), key),
        raw_token({"alg": "HS256"}, b"[" * 3000, key),
        raw_token({"alg": "HS256"}, b"[]", key),
        raw_token({"alg": "HS256"}, b"\xff\xfe", key),
        raw_token({"alg": "HS256", "kid": 5}, claims(), key),
        raw_token({"alg": "HS256", "crit": ["exp"]}, claims(), key),
        raw_token({"alg": "HS256", "b64": False}, claims(), key),
        raw_token([], claims(), key),
        good + "a" * 9000,
    ]
    for token in tokens:
        assert await status(hmac_server, token) == 401, token[:60]
    large = raw_token({"alg": "HS256"}, claims(padding="a" * 9000), key)
    assert await status(hmac_server, large) == 401
    assert await status(hmac_server, good) == 200


async def test_keys_and_tokens_side_by_side(secret_file: str) -> None:
    server = Secured(auth="keys,jwt", jwt_algorithm="HS256", jwt_secret_file=secret_file)
    assert await status(server, server.directory.add("by-key")) == 200
    assert server.echo.identity.method == "key"
    assert await status(server, jwt.encode(claims(tenant="by-token"), SECRET, "HS256")) == 200
    assert server.echo.identity.tenant == "by-token"
    assert await status(server, jwt.encode(claims(), SECRET[::-1], "HS256")) == 401
    # Admin routes are off until there is an admin key, and then an admin's token opens them too.
    admin = jwt.encode(claims(role="admin"), SECRET, "HS256")
    assert (await server.get("/admin/keys", admin)).status == 404
    server.directory.add("ops", "admin")
    assert (await server.get("/admin/keys", admin)).status == 200
    assert (await server.get("/admin/keys", jwt.encode(claims(), SECRET, "HS256"))).status == 403


async def test_failed_tokens_are_throttled(hmac_server: Secured) -> None:
    codes = [
        (await hmac_server.get("/v1/models", jwt.encode(claims(number=number), SECRET[::-1], "HS256"))).status
        for number in range(70)
    ]
    assert codes == [401] * 60 + [429] * 10


class CountingSecret(SharedSecret):
    asked = 0

    async def find(self, kid: str | None) -> bytes:
        self.asked += 1
        return await super().find(kid)


async def test_a_verified_token_is_remembered_for_a_minute_and_never_beyond_its_end() -> None:
    now = time.time()
    clock = {"now": now}
    keys = CountingSecret(SECRET.encode())
    verifier = JwtVerifier(keys, algorithm="HS256", clock=lambda: clock["now"])
    long, short = (jwt.encode(claims(exp=int(now) + seconds), SECRET, "HS256") for seconds in (3600, 20))
    for after, asked in ((0, 2), (10, 2), (25, 3), (61, 5)):
        clock["now"] = now + after
        assert await verifier.verify(long) is not None
        # The token is still good by the real clock and its leeway; what counts here is whether it was verified again.
        assert await verifier.verify(short) is not None
        assert keys.asked == asked, after


async def test_the_memory_of_tokens_is_bounded_and_holds_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwt_verifier, "_MAX_CACHED", 10)
    verifier = JwtVerifier(SharedSecret(SECRET.encode()), algorithm="HS256")
    for number in range(50):
        token = jwt.encode(claims(number=number), SECRET, "HS256")
        assert await verifier.verify(token) is not None
        assert await verifier.verify(token + "A") is None
    assert verifier.cached == 10
    assert token not in repr(vars(verifier))


async def test_no_token_and_no_secret_is_logged(hmac_server: Secured, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = ""
    for token in (
        jwt.encode(claims(tenant="confidential tenant"), SECRET, "HS256"),
        jwt.encode(claims(limits="confidential"), SECRET, "HS256"),
        jwt.encode(claims(sub="confidential"), SECRET[::-1], "HS256"),
        jwt.encode(claims(), SECRET, "HS256", headers={"kid": "confidential"}),
    ):
        said += (await hmac_server.get("/v1/models", token)).body.decode()
        said += repr([record.__dict__ for record in caplog.records]) + caplog.text
        assert not any(part in said for part in token.split(".")[1:])
    assert "a token is refused" in said
    assert "confidential" not in said
    assert SECRET not in said


def test_settings_that_cannot_verify_anything(tmp_path: Path) -> None:
    def build(content: str | bytes | None = None, **settings: Any) -> None:
        path = tmp_path / "file"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        chosen: dict[str, Any] = {"auth": "jwt", **{name: value or str(path) for name, value in settings.items()}}
        Secured(**chosen)

    for content, settings, message in (
        (None, {"jwt_algorithm": "HS256"}, "needs --jwt-secret-file"),
        (None, {"jwt_algorithm": "RS256"}, "needs --jwt-jwks"),
        ("short", {"jwt_algorithm": "HS256", "jwt_secret_file": None}, "has 5 bytes; at least 32"),
        ("a" * 31 + "\n", {"jwt_algorithm": "HS256", "jwt_secret_file": None}, "has 31 bytes"),
        ("a" * 100_000, {"jwt_algorithm": "HS256", "jwt_secret_file": None}, "larger than"),
        ("{", {"jwt_algorithm": "RS256", "jwt_jwks": None}, "not a JWKS"),
        ("[" * 100_000, {"jwt_algorithm": "RS256", "jwt_jwks": None}, "not a JWKS"),
        ('{"keys": []}', {"jwt_algorithm": "RS256", "jwt_jwks": None}, "no usable key for RS256"),
        (json.dumps({"keys": [public_jwk(RSA_KEY)]}), {"jwt_algorithm": "ES256", "jwt_jwks": None}, "no usable key"),
        ("x" * 300_000, {"jwt_algorithm": "RS256", "jwt_jwks": None}, "too large"),
        (None, {"jwt_algorithm": "RS256", "jwt_jwks": "http://id.example/jwks"}, "https"),
        (None, {"jwt_algorithm": "RS256", "jwt_jwks": "ftp://id.example/jwks"}, "https"),
        (None, {"jwt_algorithm": "RS256", "jwt_jwks": "/does/not/exist"}, "cannot read"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(content, **settings)


def test_binary_secrets_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"\xff" * 31 + b"\n")
    assert Secured(auth="jwt", jwt_algorithm="HS256", jwt_secret_file=str(path))


@pytest.mark.parametrize(
    "jwk",
    [
        public_jwk(RSA_KEY, use="enc"),
        public_jwk(RSA_KEY, alg="RS512"),
        public_jwk(RSA_KEY, key_ops=["sign"]),
        public_jwk(rsa.generate_private_key(public_exponent=65537, key_size=1024)),  # noqa: S505
        {"kty": "RSA", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "n": 5, "e": "AQAB"},
        {"kty": "oct", "k": base64url(SECRET.encode())},
        "text",
    ],
)
def test_keys_that_do_not_fit_are_left_out(jwk: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable key"):
        key_server(tmp_path, jwk)


async def test_of_a_private_key_only_the_public_part_is_read(tmp_path: Path) -> None:
    private = {**RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True), "key_ops": ["sign", "verify"]}
    assert "d" in private
    server = key_server(tmp_path, private)
    assert await status(server, jwt.encode(claims(), RSA_KEY, "RS256")) == 200
    curve = public_jwk(ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(ConfigError):
        key_server(tmp_path, curve, algorithm="ES256")


async def test_shared_secrets_are_never_read_from_a_jwks() -> None:
    async def fetch() -> bytes:
        return json.dumps({"keys": [{"kty": "oct", "k": base64url(SECRET.encode())}]}).encode()

    with pytest.raises(ValueError, match="no usable key"):
        await Jwks(fetch, "HS256").load()
