"""Scheduling: which tokens of which requests run in which step, and in which KV blocks. Knows neither torch nor HTTP."""
