"""How many draft tokens there may be. Imports no torch: the engine's process asks this where other processes hold the model."""

from __future__ import annotations

from penstock.core.config import NGRAM, EngineConfig
from penstock.engine.executor import SpeculationProfile

# Most drafts for one request and step where the scheduler chooses how many. With four of five drafts accepted the ninth would be reached
# once in six steps, and each costs a row of verification; a place to copy from lasts longer, and its drafts are free.
_MAX_DRAFTS_OF_A_MODEL = 8
_MAX_DRAFTS_OF_NGRAMS = 12


def max_draft_tokens(config: EngineConfig) -> int:
    """Most drafts for one request and step; 0 without speculation."""
    if not config.speculative_model:
        return 0
    largest = _MAX_DRAFTS_OF_NGRAMS if config.speculative_model == NGRAM else _MAX_DRAFTS_OF_A_MODEL
    return config.num_speculative_tokens or largest


def speculation_profile(config: EngineConfig) -> SpeculationProfile | None:
    """What proposals there are; None without speculation."""
    max_drafts = max_draft_tokens(config)
    return SpeculationProfile(max_drafts, adaptive=not config.num_speculative_tokens) if max_drafts else None
