"""Limits per key and tenant: requests and tokens per minute, concurrent requests."""
