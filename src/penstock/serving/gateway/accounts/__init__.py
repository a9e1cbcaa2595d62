"""Keys, tenants and the usage ledger, in a database."""
