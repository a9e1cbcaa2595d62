"""Opens the accounts of a server: the database at its schema, the first admin key, the directory of keys, the ledger."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.gateway_config import GatewayConfig
from penstock.serving.gateway.accounts.admin import KeyAdmin
from penstock.serving.gateway.accounts.admin_key_file import ensure_admin_key
from penstock.serving.gateway.accounts.database import Database
from penstock.serving.gateway.accounts.directory import AccountDirectory
from penstock.serving.gateway.accounts.ledger import UsageLedger
from penstock.serving.gateway.accounts.ledger_writer import build_ledger
from penstock.serving.gateway.accounts.migrate import prepare
from penstock.telemetry.recorder import Recorder


@dataclass(frozen=True, slots=True)
class Accounts:
    """`has_keys`: a key that can be used existed when the accounts were opened."""

    database: Database
    admin: KeyAdmin
    keys: AccountDirectory
    usage: UsageLedger
    has_keys: bool

    async def close(self) -> None:
        """Write the usage that waits, then leave the database."""
        await self.usage.close()
        await self.keys.close()
        await self.database.close()


async def open_accounts(config: GatewayConfig, recorder: Recorder) -> Accounts:
    """Raises ConfigError when the database, its schema, the admin key file or the price table cannot be used."""
    database = Database(config.database_url)
    try:
        await prepare(database)
        admin = KeyAdmin(database)
        if config.admin_key_file:
            await ensure_admin_key(admin, config.admin_key_file)
        usage = build_ledger(config, database, recorder)
        has_keys = await admin.any_usable()
        await usage.start()
    except BaseException:
        await database.close()
        raise
    return Accounts(database, admin, AccountDirectory(database, recorder), usage, has_keys)
