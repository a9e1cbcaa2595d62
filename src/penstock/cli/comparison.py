"""The work of `penstock verify`: the same prompts through transformers and through our model, in float32.

The two models are loaded one after the other, so that memory for one of them is enough.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.execution.models.config import ModelConfig
from penstock.execution.models.registry import load_model
from penstock.testing.exactness import GreedyComparison, compare_greedy
from penstock.testing.paged_model import PagedModel

# Prompt tokens per forward pass of ours: prompts are computed in chunks, as when serving.
CHUNK_TOKENS = 64
BLOCK_SIZE = 16
MAX_PROMPT_TOKENS = 300


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt. `max_logit_difference`: over all positions of the prompt and the whole vocabulary."""

    num_prompt_tokens: int
    max_logit_difference: float
    greedy: GreedyComparison


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers computes: logits [prompt tokens, vocabulary], greedy tokens and their top-two margins."""

    logits: Tensor
    tokens: list[int]
    margins: list[float]


def compare(folder: Path, num_prompts: int, num_tokens: int, margin: float) -> Iterator[Row]:
    """A row per prompt, as they are done. Raises ModelFormatError."""
    config = ModelConfig.from_folder(folder)
    longest_prompt = min(MAX_PROMPT_TOKENS, config.max_position_embeddings - num_tokens)
    prompts = make_prompts(num_prompts, config.vocab_size, longest_prompt)
    references = reference_results(folder, prompts, num_tokens)
    loaded = load_model(EngineConfig(), folder, torch.device("cpu"), torch.float32, progress=False)
    longest = max(len(prompt) for prompt in prompts) + num_tokens
    for prompt, reference in zip(prompts, references, strict=True):
        paged = PagedModel(loaded, num_blocks=longest // BLOCK_SIZE + 1, block_size=BLOCK_SIZE)
        logits, tokens = our_result(paged, prompt, num_tokens)
        difference = (logits - reference.logits).abs().max().item()
        yield Row(len(prompt), difference, compare_greedy(tokens, reference.tokens, reference.margins, margin=margin))


def make_prompts(count: int, vocab_size: int, longest: int) -> list[list[int]]:
    """Random token ids, the same at every run: they reach the whole vocabulary and need no tokenizer."""
    rng = random.Random(0)  # noqa: S311 - test data
    lengths = [1, *(rng.randint(2, max(2, longest)) for _ in range(count - 1))]
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths[:count]]


def reference_results(folder: Path, prompts: list[list[int]], num_tokens: int) -> list[Reference]:
    """Prompt by prompt through transformers, with its own cache."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        return [_reference_result(model, prompt, num_tokens) for prompt in prompts]


def _reference_result(model: Any, prompt: list[int], num_tokens: int) -> Reference:
    tokens: list[int] = []
    margins: list[float] = []
    output = model(torch.tensor([prompt]), use_cache=True)
    logits = output.logits[0].clone()
    while True:
        best = output.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        if len(tokens) == num_tokens:
            return Reference(logits, tokens, margins)
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)


def our_result(paged: PagedModel, prompt: list[int], num_tokens: int) -> tuple[Tensor, list[int]]:
    """Logits of the prompt [tokens, vocabulary] and greedy tokens, over a paged cache in chunks."""
    chunks = [prompt[start : start + CHUNK_TOKENS] for start in range(0, len(prompt), CHUNK_TOKENS)]
    logits = torch.cat([paged.step({"prompt": chunk})["prompt"] for chunk in chunks])
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(paged.step({"prompt": tokens[-1:]})["prompt"][-1].argmax()))
    return logits, tokens
