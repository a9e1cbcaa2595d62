"""The response cache and single flight."""
