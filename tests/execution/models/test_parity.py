"""Logits equal transformers' in float32 for every architecture and variant, however the tokens are cut into steps and batches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from penstock.core.config import EngineConfig
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.paged_model import PagedModel

TOLERANCE = 1e-4

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-mha": {"num_kv_heads": 4},
    "llama-mqa": {"num_kv_heads": 1},
    "llama-wide-heads": {"head_dim": 32},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama-linear-legacy": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "legacy_rope": True},
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-llama3-legacy": {"rope_parameters": LLAMA3, "legacy_rope": True},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-yarn-factors": {"rope_parameters": YARN | {"mscale": 1.3, "mscale_all_dim": 0.7, "truncate": False}},
    "llama-yarn-attention-factor": {"rope_parameters": YARN | {"attention_factor": 1.4, "beta_fast": 20.0}},
    "llama-sharded": {"num_shards": 3},
    "llama-bfloat16": {"dtype": "bfloat16"},
    "llama-float16": {"dtype": "float16"},
    "llama-tied-bfloat16": {"tie_word_embeddings": True, "dtype": "bfloat16"},
    "mistral": {"model_type": "mistral"},
    "mistral-window": {"model_type": "mistral", "sliding_window": 20},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied-yarn": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": YARN},
    "qwen2-window": {
        "model_type": "qwen2",
        "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-tied-biases": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3-window": {"model_type": "qwen3", "head_dim": 32, "sliding_window": 24},
    "mixtral": {"model_type": "mixtral"},
    "mixtral-top3-of-8-window": {
        "model_type": "mixtral",
        "num_experts": 8,
        "experts_per_token": 3,
        "sliding_window": 20,
    },
    "qwen3-moe": {"model_type": "qwen3_moe", "head_dim": 32, "num_experts": 8, "experts_per_token": 3},
    "qwen3-moe-shares-tied-window": {
        "model_type": "qwen3_moe",
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "sliding_window": 24,
    },
    "qwen3-moe-some-dense": {
        "model_type": "qwen3_moe",
        "num_layers": 4,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
        "attention_bias": True,
    },
}


@dataclass
class Case:
    loaded: LoadedModel
    reference: Any
    prompt: list[int]
    expected: Tensor

    def logits_of(self, token_ids: list[int]) -> Tensor:
        """transformers' logits [tokens, vocab_size]."""
        with torch.no_grad():
            logits: Tensor = self.reference(torch.tensor([token_ids])).logits[0]
        return logits


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), **VARIANTS[request.param])
    return make_case(folder)


def make_case(folder: Path, prompt_length: int = 75) -> Case:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    loaded = load_model(EngineConfig(), folder, torch.device("cpu"), torch.float32, progress=False)
    prompt = random_tokens(prompt_length, seed=1)
    case = Case(loaded, reference, prompt, torch.empty(0))
    case.expected = case.logits_of(prompt)
    return case


def random_tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_whole_prompt(case: Case) -> None:
    model = PagedModel(case.loaded)
    assert_equal(model.step({"a": case.prompt})["a"], case.expected)


def test_prompt_in_chunks(case: Case) -> None:
    model = PagedModel(case.loaded)
    cuts = [0, 16, 17, 40, 41, 73, 75]
    pieces = [model.step({"a": case.prompt[start:end]})["a"] for start, end in pairwise(cuts)]
    assert_equal(torch.cat(pieces), case.expected)


def test_token_by_token(case: Case) -> None:
    model = PagedModel(case.loaded)
    prefix = model.step({"a": case.prompt[:30]})["a"]
    decoded = [model.step({"a": [token]})["a"] for token in case.prompt[30:]]
    assert_equal(torch.cat([prefix, *decoded]), case.expected)


def test_mixed_batch(case: Case) -> None:
    """Decodes of very different lengths, a fresh prompt and a chunk in one step; blocks are reused and out of order."""
    model = PagedModel(case.loaded, num_blocks=14)
    prompts = {name: random_tokens(length, seed=length) for name, length in (("s", 2), ("m", 33), ("l", 70), ("c", 45))}
    model.step({"gone": random_tokens(60, seed=9)})
    model.finish("gone")
    for name, prompt in prompts.items():
        model.step({name: prompt[:-3] if name == "c" else prompt[:-1]})
    fresh = random_tokens(21, seed=5)
    logits = model.step({"c": prompts["c"][-3:], "fresh": fresh} | {name: [prompts[name][-1]] for name in "sml"})
    for name, prompt in (prompts | {"fresh": fresh}).items():
        assert_equal(logits[name], case.logits_of(prompt)[-len(logits[name]) :])


def test_dynamic_scaling_beyond_the_original_length_equals_cached_generation(tmp_path: Path) -> None:
    """Past max_position_embeddings our rotation is transformers' when it generates token by token with its cache."""
    rope = {"rope_type": "dynamic", "factor": 4.0}
    folder = write_tiny_checkpoint(tmp_path, rope_parameters=rope, max_position_embeddings=32)
    case = make_case(folder, prompt_length=32)
    assert case.loaded.config.max_model_len == 128
    token_ids = case.prompt + random_tokens(30, seed=2)
    cache, expected = None, []
    with torch.no_grad():
        for token in token_ids:
            output = case.reference(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            expected.append(output.logits[0])
    model = PagedModel(case.loaded)
    pieces = [model.step({"a": piece})["a"] for piece in (token_ids[:40], token_ids[40:61], token_ids[61:])]
    assert_equal(torch.cat(pieces), torch.cat(expected))


def test_bfloat16_arithmetic_stays_close(tmp_path: Path) -> None:
    """No exact parity in half precision; the distributions must agree."""
    folder = write_tiny_checkpoint(tmp_path, "qwen3", head_dim=32)
    case = make_case(folder)
    loaded = load_model(EngineConfig(), folder, torch.device("cpu"), torch.bfloat16, progress=False)
    logits = PagedModel(loaded).step({"a": case.prompt})["a"]
    assert logits.dtype == torch.float32
    ours, theirs = logits.log_softmax(-1), case.expected.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)  # per token
    assert divergence.max() < 1e-2
