"""Penstock: an LLM inference engine and the production gateway around it, in one package."""

__version__ = "0.1.0"
