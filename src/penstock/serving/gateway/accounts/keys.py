"""What an API key looks like, how one is made, and how one is verified.

    psk_<look-up id>_<secret>       psk_ + 16 characters [a-z2-7] + _ + 43 characters of url-safe base64 (256 random bits)

The id finds the key, the secret proves it. Only SHA-256 of the secret is kept: for 256 random bits a slow hash would protect nothing and
would cost every request.

A secret that an operator brought along (--admin-key-file) may be any 32 to 512 visible ASCII characters: the whole is the secret, and
the id is derived from it. Nothing here needs the database.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

from penstock.serving.gateway.accounts.interface import KeyEntry

PREFIX = "psk_"
ID_LENGTH = 16
MIN_FOREIGN_LENGTH = 32
MAX_FOREIGN_LENGTH = 512
_TOKEN = re.compile(r"psk_([a-z2-7]{16})_([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[a-z2-7]{16}")
_FOREIGN = re.compile(rf"[!-~]{{{MIN_FOREIGN_LENGTH},{MAX_FOREIGN_LENGTH}}}")
# Compared when there is no such key, so that both cases do the same work. Not the hash of anything known.
_DUMMY_HASH = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A key as a client sent it. The secret never shows in a repr."""

    key_id: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: `token` is what the client sends, shown once; the rest is kept."""

    key_id: str
    token: str = field(repr=False)
    secret_hash: bytes = field(repr=False)


def new_key() -> NewKey:
    """A new random key."""
    key_id = base64.b32encode(secrets.token_bytes(10)).decode().lower()
    secret = secrets.token_urlsafe(32)
    return NewKey(key_id, f"{PREFIX}{key_id}_{secret}", hash_secret(secret))


def parse_key(token: str) -> PresentedKey | None:
    """The parts of a token; None for what cannot be a key. Bounded work whatever the length."""
    if len(token) > MAX_FOREIGN_LENGTH:
        return None
    if match := _TOKEN.fullmatch(token):
        return PresentedKey(match[1], match[2])
    if token.startswith(PREFIX) or not _FOREIGN.fullmatch(token):
        return None
    return PresentedKey(_derived_id(token), token)


def is_key_id(text: str) -> bool:
    """Whether `text` can be a look-up id."""
    return _ID.fullmatch(text) is not None


def hash_secret(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def verify(presented: PresentedKey, entry: KeyEntry | None) -> bool:
    """Whether the secret is that of a usable key. Constant time in the secret, and the same work when there is no such key."""
    expected = _DUMMY_HASH if entry is None else entry.secret_hash
    equal = hmac.compare_digest(hash_secret(presented.secret), expected)
    return equal and entry is not None and entry.usable


def shown_prefix(key_id: str) -> str:
    """What lists and logs show of a key."""
    return f"{PREFIX}{key_id}_…"


def _derived_id(secret: str) -> str:
    digest = hashlib.sha256(b"penstock key id\0" + secret.encode()).digest()
    return base64.b32encode(digest[:10]).decode().lower()
