"""The first admin key from a secret file, as containers get their secrets (--admin-key-file).

The file holds one line: a key in Penstock's format, or any secret of 32 to 512 visible ASCII characters, which then is the bearer token.
Every start makes sure that this secret, and no earlier one from the file, is an admin key of the tenant "admin"; a file that
changed therefore rotates the key. A key that an admin revoked stays revoked: then the file needs a new secret.
"""

from __future__ import annotations

import logging

from sqlalchemy.exc import IntegrityError

from penstock.core.errors import ConfigError
from penstock.serving.gateway.accounts.admin import FILE_LABEL, MAX_PAGE, KeyAdmin
from penstock.serving.gateway.accounts.keys import (
    MAX_FOREIGN_LENGTH,
    MIN_FOREIGN_LENGTH,
    NewKey,
    hash_secret,
    parse_key,
    shown_prefix,
)
from penstock.serving.gateway.accounts.rules import KeySettings
from penstock.serving.gateway.security.startup import read_secret

logger = logging.getLogger(__name__)

TENANT = "admin"
_ACTOR = "--admin-key-file"


async def ensure_admin_key(admin: KeyAdmin, path: str) -> str:
    """Make the file's secret the admin key; its id. Idempotent, and safe in several processes at once. Raises ConfigError."""
    key = _read(path)
    if not await admin.has_secret(key.key_id, key.secret_hash):
        try:
            await admin.create(TENANT, "admin", KeySettings(label=FILE_LABEL), actor=_ACTOR, key=key)
        except IntegrityError:
            # Another process was quicker, or the id belongs to another secret.
            if not await admin.has_secret(key.key_id, key.secret_hash):
                raise ConfigError(
                    f"--admin-key-file {path}: there is a key {shown_prefix(key.key_id)} with another secret. "
                    "Put a new key into the file."
                ) from None
    await _revoke_earlier(admin, key.key_id)
    info = await admin.show(key.key_id)
    if info.role != "admin":
        raise ConfigError(f"--admin-key-file {path}: the key {shown_prefix(key.key_id)} exists and is no admin key.")
    if info.revoked_at is not None:
        logger.warning(
            "the key %s of --admin-key-file was revoked and stays so; put a new secret into the file", key.key_id
        )
    return key.key_id


def _read(path: str) -> NewKey:
    token = read_secret("admin_key_file", path, min_bytes=MIN_FOREIGN_LENGTH).decode("ascii", "replace")
    parsed = parse_key(token)
    if parsed is None:
        raise ConfigError(
            f"--admin-key-file {path} must hold one line: a key made by `penstock keys create`, or a secret of "
            f"{MIN_FOREIGN_LENGTH} to {MAX_FOREIGN_LENGTH} visible ASCII characters."
        )
    return NewKey(parsed.key_id, token, hash_secret(parsed.secret))


async def _revoke_earlier(admin: KeyAdmin, current: str) -> None:
    after = ""
    while page := await admin.keys(TENANT, after=after):
        for info in page:
            if info.settings.label == FILE_LABEL and info.id != current and info.revoked_at is None:
                await admin.revoke(info.id, actor=_ACTOR)
        after = page[-1].id
        if len(page) < MAX_PAGE:
            return
