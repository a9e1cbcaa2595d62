"""The settings of speculation, made real: the draft model and the proposer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from penstock.core.config import NGRAM, EngineConfig
from penstock.core.errors import ConfigError, IntegrityError
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.parallel.groups import WHOLE_MODEL
from penstock.execution.runner.draft_lengths import max_draft_tokens
from penstock.execution.runner.limits import torch_dtype
from penstock.execution.speculative.draft_model import DraftModel, DraftModelProposer, TokenSource
from penstock.execution.speculative.ngram import NGramProposer
from penstock.execution.speculative.proposer import Proposer, Sequences


def load_draft(config: EngineConfig, target: LoadedModel, device: torch.device, progress: bool) -> LoadedModel | None:
    """The draft model that `config`, which is resolved, asks for; None when it asks for none. It is never split over ranks.

    It computes in the target's type, with its own checkpoint's precision of weights, and shares the settings of the attention and of the KV
    cache. Raises ConfigError when its vocabulary is not the target's, and whatever `load_model` raises.
    """
    if config.speculative_model in ("", NGRAM):
        return None
    folder = Path(config.speculative_model)
    model = ModelConfig.from_folder(folder)
    if model.vocab_size != target.config.vocab_size:
        raise ConfigError(
            f"--speculative-model {folder.name} has a vocabulary of {model.vocab_size:,} tokens, the model one of "
            f"{target.config.vocab_size:,}; take a draft model made for the same tokenizer, or 'ngram'."
        )
    own = dataclasses.replace(
        config,
        model=str(folder),
        revision=None,
        quantization="auto",
        max_model_len=min(config.max_model_len, model.max_model_len),
        speculative_model="",
        num_speculative_tokens=0,
    )
    return load_model(own, folder, device, torch_dtype(config.dtype), progress, WHOLE_MODEL)


def draft_bytes_per_block(draft: LoadedModel) -> int:
    """What the draft model's layers add to a KV block, on the device and in the host tier."""
    return draft.config.num_layers * draft.attention_backend.bytes_per_block(draft.cache_spec)


def make_proposer(
    config: EngineConfig,
    draft: LoadedModel | None,
    *,
    num_blocks: int,
    num_host_blocks: int,
    batch: Sequences,
    sampler: TokenSource,
    device: torch.device,
) -> Proposer | None:
    """What `config`, which is resolved, asks for; None when it asks for none. Takes the memory of the draft model's KV caches: as many
    blocks as the model has."""
    if not config.speculative_model:
        return None
    if config.speculative_model == NGRAM:
        return NGramProposer(batch)
    if draft is None:
        raise IntegrityError("the draft model was not loaded")
    backend, spec, layers = draft.attention_backend, draft.cache_spec, range(draft.config.num_layers)
    max_model_len = min(config.max_model_len, draft.config.max_model_len)
    draft.model.prepare(max_model_len)
    model = DraftModel(
        model=draft.model,
        backend=backend,
        kv_caches=[backend.allocate_kv_cache(num_blocks, spec, device) for _ in layers],
        host_caches=[backend.allocate_host_cache(num_host_blocks, spec, device) for _ in layers if num_host_blocks],
        max_model_len=max_model_len,
        device=device,
    )
    # Half a step's tokens keep the model's own rhythm; the few that each request misses after a step with drafts always find room.
    max_tokens = max(config.max_num_batched_tokens // 2, 2 * config.max_num_seqs)
    return DraftModelProposer(model, sequences=batch, sampler=sampler, max_tokens=max_tokens)


def speculation_text(config: EngineConfig, draft: LoadedModel | None) -> str:
    """What reports say of speculation, such as 'stories-draft (0.3 M parameters), 4 draft tokens'; '' without it."""
    if not config.speculative_model:
        return ""
    name = "n-grams of the request" if config.speculative_model == NGRAM else Path(config.speculative_model).name
    size = f" ({draft.num_parameters / 1e6:,.1f} M parameters)" if draft is not None else ""
    fixed = config.num_speculative_tokens
    plural = "" if fixed == 1 else "s"
    count = (
        f"{fixed} draft token{plural}" if fixed else f"up to {max_draft_tokens(config)} draft tokens, as many as pay"
    )
    return f"{name}{size}, {count}"
