"""Attention over a paged KV cache: the forward context, the backend protocol, the registry, and one file per backend."""
