"""Penstock: an LLM inference engine and the production gateway around it, in one package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.core.config import EngineConfig, ServerConfig
from penstock.core.types import SamplingParams

if TYPE_CHECKING:
    from penstock.llm import LLM, AsyncLLM

__version__ = "0.1.0"

__all__ = ["LLM", "AsyncLLM", "EngineConfig", "SamplingParams", "ServerConfig", "__version__"]


def __getattr__(name: str) -> Any:
    # `penstock --help` and the gateway must not pay for the engine's imports.
    if name in ("LLM", "AsyncLLM"):
        from penstock import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
