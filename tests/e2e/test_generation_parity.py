"""Greedy tokens of the whole engine against one-by-one transformers, with everything in play that could change them.

64 prompts of 1 to 300 tokens, half of them with common beginnings, are served in one continuous batch with a 64-token budget, a cache
so small that requests are preempted, prefix hits, and a host tier that blocks are written to and come back from.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock import LLM, SamplingParams
from penstock.testing.checkpoints import write_tiny_checkpoint
from penstock.testing.exactness import GreedyComparison, compare_greedy, mismatch_report

NUM_PROMPTS = 64
OUTPUT_TOKENS = 12
VOCAB = 272

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied-mqa-biased": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "num_kv_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-mha-sharded": {"model_type": "llama", "num_kv_heads": 4, "num_shards": 3},
    "llama-linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "llama-dynamic": {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "llama-llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN},
    "mistral-sliding-window": {"model_type": "mistral", "sliding_window": 40},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "llama-bf16": {"model_type": "llama", "dtype": "bfloat16"},
    "llama-fp16": {"model_type": "llama", "dtype": "float16"},
}


def make_prompts() -> list[list[int]]:
    rng = random.Random(7)
    bases = [[rng.randrange(VOCAB - 16) for _ in range(200)] for _ in range(2)]
    prompts = []
    for number in range(NUM_PROMPTS):
        length = 1 + number * 299 // (NUM_PROMPTS - 1)
        shared = rng.choice(bases)[: rng.randrange(length)] if number % 2 else []
        prompts.append(shared + [rng.randrange(VOCAB - 16) for _ in range(length - len(shared))])
    rng.shuffle(prompts)
    return prompts


def compare_with_transformers(
    folder: Path, prompts: list[list[int]], outputs: list[list[int]]
) -> list[GreedyComparison]:
    """One forward over prompt and our output gives what transformers would have chosen after each of our tokens."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    comparisons = []
    with torch.inference_mode():
        for prompt, output in zip(prompts, outputs, strict=True):
            logits = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
            top = logits.topk(2).values
            chosen = logits.argmax(-1).tolist()
            comparisons.append(compare_greedy(output, chosen, (top[:, 0] - top[:, 1]).tolist()))
    return comparisons


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_those_of_transformers(variant: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model", vocab_size=VOCAB, **VARIANTS[variant])
    prompts = make_prompts()
    parameters = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    head_dim, kv_heads = VARIANTS[variant].get("head_dim", 16), VARIANTS[variant].get("num_kv_heads", 2)
    # The cache: 24 blocks of 16 tokens, the longest request and little more.
    bytes_per_block = 2 * 2 * 16 * kv_heads * head_dim * 4
    with LLM(
        str(folder),
        dtype="float32",
        threads=1,
        max_num_batched_tokens=64,
        max_num_seqs=16,
        max_prefill_tokens_while_decoding=48,
        kv_cache_gib=24 * bytes_per_block / 2**30,
        swap_space_gib=200 * bytes_per_block / 2**30,
    ) as llm:
        first = [result.outputs[0].token_ids for result in llm.generate(prompts, parameters)]
        again = [result.outputs[0].token_ids for result in llm.generate(prompts[:16], parameters)]
        stats = llm.stats
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert stats.swapped_out_blocks > 0
    assert stats.swapped_in_blocks > 0
    assert stats.kv_blocks_used == 0
    report = mismatch_report(compare_with_transformers(folder, [*prompts, *prompts[:16]], [*first, *again]))
    assert report is None, report


def test_the_host_tier_changes_no_token(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model")
    prompts = make_prompts()[:24]
    parameters = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    outputs = []
    swapped = []
    for swap_space_gib in (0.0, 0.01):
        with LLM(
            str(folder),
            threads=1,
            max_num_batched_tokens=64,
            kv_cache_gib=24 * 8192 / 2**30,
            swap_space_gib=swap_space_gib,
        ) as llm:
            runs = [llm.generate(prompts, parameters) for _ in range(2)]
            outputs.append([[result.outputs[0].token_ids for result in run] for run in runs])
            swapped.append(llm.stats.swapped_in_blocks)
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == outputs[0][1], "the second run hits the cache and says the same"
    assert swapped[0] == 0
    assert swapped[1] > 0
