"""Several ranks give what one gives: every architecture over tensor ranks, over pipeline stages and over both, with requests preempted,
prompts in chunks and prefixes reused. One group of processes serves all of it, one model after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.core.types import LiveLimits, SamplingParams
from penstock.engine.engine import Engine
from penstock.execution.kernels.native import native_available
from penstock.execution.kernels.triton.support import interpreted
from penstock.execution.runner.executors import UniProcessExecutor
from penstock.execution.runner.parallel_executor import ParallelExecutor
from penstock.execution.runner.rank_group import RankGroup
from penstock.testing.builders import make_request, run_to_end
from penstock.testing.checkpoints import write_tiny_checkpoint
from tests.e2e.parallel_harness import Run, assert_equal, parallel, reference, run

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied-biased": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 40},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "mixtral": {"model_type": "mixtral", "num_experts": 5, "experts_per_token": 2},
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 8, "experts_per_token": 3, "mlp_only_layers": [1]},
}
SPLITS = {"tp2": (2, 1), "pp2": (1, 2), "tp2-pp2": (2, 2), "tp4": (4, 1), "pp4": (1, 4)}


@pytest.fixture(scope="module")
def warm() -> Iterator[RankGroup]:
    warm = RankGroup.start(4)
    yield warm
    warm.close()


@pytest.fixture
def group(warm: RankGroup) -> RankGroup:
    """Ranks that import nothing any more; new ones after a test that broke them, so that one failure is one failure."""
    if not all(rank.is_alive() for rank in warm.ranks):
        warm.close()
        warm.ranks = RankGroup.start(4).ranks
    return warm


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def folder(variant: str) -> Path:
        # Four layers, so that there are four stages; heads that two and four ranks can share.
        return write_tiny_checkpoint(
            tmp_path_factory.mktemp("parity") / variant, vocab_size=272, num_layers=4, **VARIANTS[variant]
        )

    return folder


@pytest.fixture(scope="module")
def expected_of(folder_of: Any) -> Any:
    @cache
    def expected(variant: str, **changes: Any) -> Run:
        return reference(folder_of(variant), **changes)

    return expected


def check(
    group: RankGroup,
    folder_of: Any,
    expected_of: Any,
    variant: str,
    split: str,
    *,
    bound: float | None = None,
    **changes: Any,
) -> None:
    tensor, stages = SPLITS[split]
    with parallel(group, folder_of(variant), tensor, stages, **changes) as executor:
        info = executor.model_info()
        assert (info.tensor_parallel_size, info.pipeline_parallel_size) == (tensor, stages)
        assert executor.max_inflight == executor.micro_batches == stages
        ours = run(executor, executor.config)
    # A stage computes what it computes in one process; sums over ranks are in another order.
    assert_equal(ours, expected_of(variant, **changes), exact=tensor == 1, bound=bound)


@pytest.mark.parametrize("split", ["tp2", "pp2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture(group: RankGroup, folder_of: Any, expected_of: Any, variant: str, split: str) -> None:
    check(group, folder_of, expected_of, variant, split)


# How far log-probabilities of these models may move when every rank rounds its own columns of weights, and its own part of activations,
# with scales of its own: two to three times what is seen (0.08 and 0.06).
ROUNDING_BOUND = 0.2
PAIRS = [
    ("llama", {"quantization": "int8"}, ROUNDING_BOUND),
    ("qwen3", {"quantization": "int4"}, ROUNDING_BOUND),
    ("qwen2", {"kv_cache_dtype": "int8"}, None),
    ("mistral", {"attention_backend": "torch"}, None),
    ("qwen3-moe", {"quantization": "int8"}, ROUNDING_BOUND),
]


@pytest.mark.skipif(not native_available(), reason="no native kernels")
@pytest.mark.parametrize(("variant", "changes", "bound"), PAIRS)
def test_both_at_once_with_what_else_changes_numbers(
    group: RankGroup, folder_of: Any, expected_of: Any, variant: str, changes: dict[str, Any], bound: float | None
) -> None:
    check(group, folder_of, expected_of, variant, "tp2-pp2", bound=bound, **changes)


@pytest.mark.skipif(not native_available(), reason="no native kernels")
@pytest.mark.parametrize("quantization", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_stages_of_quantised_layers_are_equal_bit_by_bit(
    group: RankGroup, folder_of: Any, expected_of: Any, quantization: str
) -> None:
    check(group, folder_of, expected_of, "llama", "pp2", quantization=quantization)


@pytest.mark.parametrize(
    ("split", "drafts"),
    [
        ("pp2", "model"),
        ("tp2", "ngram"),
        pytest.param("pp2", "ngram", marks=pytest.mark.slow),
        pytest.param("tp2", "model", marks=pytest.mark.slow),
        pytest.param("tp2-pp2", "model", marks=pytest.mark.slow),
    ],
)
def test_drafts_change_nothing(
    group: RankGroup, folder_of: Any, expected_of: Any, split: str, drafts: str, tmp_path: Path
) -> None:
    """Against one rank without drafts. The draft model is the model's first layers' size, and agrees with it now and then."""
    model = "ngram"
    if drafts == "model":
        model = str(write_tiny_checkpoint(tmp_path / "draft", vocab_size=272, num_layers=1))
    tensor, stages = SPLITS[split]
    speculation = {"speculative_model": model, "num_speculative_tokens": 3}
    layers = 1 if drafts == "model" else 0
    with parallel(group, folder_of("llama"), tensor, stages, draft_layers=layers, **speculation) as executor:
        assert executor.speculation is not None
        assert executor.model_info().speculation
        ours = run(executor, executor.config)
    assert ours.stats.draft_tokens > 0
    assert ours.stats.verifications > 0
    assert_equal(ours, expected_of("llama"), exact=tensor == 1)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["tp2-pp2", "tp4", "pp4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_in_more_parts(
    group: RankGroup, folder_of: Any, expected_of: Any, variant: str, split: str
) -> None:
    check(group, folder_of, expected_of, variant, split)


@pytest.mark.slow
def test_what_cannot_start_is_one_line(group: RankGroup, folder_of: Any) -> None:
    with (
        pytest.raises(ConfigError, match="--tensor-parallel-size 3 does not divide the model's 4 attention heads"),
        parallel(group, folder_of("llama"), 3, 1),
    ):
        pass
    assert not any(rank.is_alive() for rank in group.ranks[:3]), "no rank is left of a start that failed"


@pytest.mark.slow
@pytest.mark.skipif(not interpreted(), reason="Triton's interpreter is not on")
@pytest.mark.parametrize(("split", "overlap"), [("tp2", "on"), ("pp2", "auto")])
def test_the_path_of_a_gpu(group: RankGroup, folder_of: Any, split: str, overlap: str) -> None:
    """Triton kernels, interpreted: tensor ranks launch steps behind the host's back and replay graphs, stages run them one by one."""
    tensor, stages = SPLITS[split]
    folder = folder_of("llama")
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        attention_backend="triton",
        dtype="float32",
        threads=1,
        kv_cache_gib=0.001,
        max_model_len=64,
        max_num_batched_tokens=16,
        max_num_seqs=2,
        overlap_scheduling=overlap,
    )
    tokens = []
    divided = dataclasses.replace(config, tensor_parallel_size=tensor, pipeline_parallel_size=stages)
    for executor in (
        ParallelExecutor(divided, folder, group=RankGroup(group.ranks[:2])),
        UniProcessExecutor(config, folder),
    ):
        assert executor.max_inflight == 2 or overlap == "auto"
        limits = LiveLimits(max_num_batched_tokens=16, max_num_seqs=2, max_prefill_tokens_while_decoding=16)
        engine = Engine(executor, limits)
        for index in range(2):
            prompt = range(3 + index, 12 + 3 * index)
            sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, seed=0)
            engine.add(make_request(prompt, request_id=str(index), sampling=sampling))
        tokens.append(run_to_end(engine).tokens)
        engine.shutdown()
    assert tokens[0] == tokens[1]
