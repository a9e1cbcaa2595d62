"""Links to what several gateway processes share: Redis, the coordinator."""
