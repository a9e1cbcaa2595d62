"""The settings of speculation made real, what is measured for them, and the embedded model with its draft model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from penstock.core.config import EMBEDDED_DRAFT, EMBEDDED_MODEL, NGRAM, EngineConfig
from penstock.core.errors import ConfigError, IntegrityError
from penstock.core.types import EngineRequest, EngineStats, LiveLimits, SamplingParams
from penstock.engine.engine import Engine
from penstock.engine.executor import SpeculationProfile
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.draft_lengths import max_draft_tokens, speculation_profile
from penstock.execution.runner.executors import UniProcessExecutor
from penstock.execution.runner.speculation import draft_bytes_per_block, load_draft, make_proposer, speculation_text
from penstock.execution.speculative.ngram import NGramProposer
from penstock.execution.speculative.proposer import Proposer
from penstock.hub import resolve_model
from penstock.serving.frontend.tokenizer import Tokenizer
from penstock.testing.builders import Collector
from penstock.testing.checkpoints import write_tiny_checkpoint
from tests.execution.runner.harness import CPU, Harness, new_request, solo_tokens

RESOLVED = EngineConfig(
    device="cpu",
    dtype="float32",
    attention_backend="torch",
    block_size=4,
    max_model_len=128,
    max_num_batched_tokens=32,
    max_num_seqs=6,
)


def speculating(model: str, count: int = 0) -> EngineConfig:
    return dataclasses.replace(RESOLVED, speculative_model=model, num_speculative_tokens=count)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model with the tiny model's vocabulary and half the context of RESOLVED."""
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("speculation") / "small-draft", num_layers=1, max_position_embeddings=64
    )


def made(harness: Harness, config: EngineConfig, draft: LoadedModel | None) -> Proposer | None:
    return make_proposer(
        config, draft, num_blocks=64, num_host_blocks=8, batch=harness.batch, sampler=harness.sampler, device=CPU
    )


# ---- settings ----


def test_no_speculation_and_ngrams_load_nothing(loaded: LoadedModel) -> None:
    for model in ("", NGRAM):
        assert load_draft(speculating(model), loaded, CPU, False) is None
    harness = Harness(loaded)
    assert made(harness, speculating(""), None) is None
    assert isinstance(made(harness, speculating(NGRAM), None), NGramProposer)
    with pytest.raises(IntegrityError):
        made(harness, speculating("draft"), None)


def test_a_draft_model_beside_a_model(loaded: LoadedModel, small: Path) -> None:
    config = dataclasses.replace(speculating(str(small)), quantization="int8")
    draft = load_draft(config, loaded, CPU, False)
    assert draft is not None
    # What rounds the model does not round its draft model.
    assert draft.quantization == "none"
    # One layer of 4 tokens, keys and values of 2 heads of 16 numbers, in float32.
    assert draft_bytes_per_block(draft) == 4 * 2 * 2 * 16 * 4

    def proposer(harness: Harness) -> Proposer:
        proposer = made(harness, config, draft)
        assert proposer is not None
        return proposer

    harness = Harness(loaded, make_proposer=proposer)
    prompt = list(range(100, 140))
    output = harness.step({"a": 40}, new=[new_request("a", prompt, range(16))], num_proposals={"a": 3})
    # 16 tokens a call, so that a step of 32 stays one, until the 41 are computed.
    for length in (41, 42):
        assert not output.draft_token_ids
        output = harness.step({"a": 1}, num_proposals={"a": 3})
        assert length == len(harness.batch.token_ids(0)) - 1
    assert output.draft_token_ids["a"] == solo_tokens(draft, [*prompt, *solo_tokens(loaded, prompt, 3)], 3)


def test_another_vocabulary_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", vocab_size=300)
    with pytest.raises(ConfigError, match=r"--speculative-model other has a vocabulary of 300 tokens.* 272"):
        load_draft(speculating(str(other)), loaded, CPU, False)


@pytest.mark.parametrize(
    ("model", "count", "most", "text"),
    [
        ("", 0, 0, ""),
        (NGRAM, 1, 1, "n-grams of the request, 1 draft token"),
        (NGRAM, 0, 12, "n-grams of the request, up to 12 draft tokens, as many as pay"),
        ("/models/small", 4, 4, "small (0.2 M parameters), 4 draft tokens"),
        ("/models/small", 0, 8, "small (0.2 M parameters), up to 8 draft tokens, as many as pay"),
    ],
)
def test_what_reports_say(draft: LoadedModel, model: str, count: int, most: int, text: str) -> None:
    config = speculating(model, count)
    described = dataclasses.replace(draft, num_parameters=210_000) if model.startswith("/") else None
    assert max_draft_tokens(config) == most
    assert speculation_text(config, described) == text


def test_lengths_are_fixed_or_chosen_while_serving() -> None:
    assert speculation_profile(speculating("")) is None
    assert speculation_profile(speculating(NGRAM, 5)) == SpeculationProfile(5)
    assert speculation_profile(speculating(NGRAM)) == SpeculationProfile(12, adaptive=True)
    assert speculation_profile(speculating("draft")) == SpeculationProfile(8, adaptive=True)


# ---- the embedded pair ----


def embedded(speculative_model: str, count: int, temperature: float) -> tuple[list[list[int]], EngineStats]:
    """Three stories, and what the engine says of itself."""
    folder = resolve_model(EMBEDDED_MODEL)
    config = EngineConfig(
        device="cpu", threads=1, kv_cache_gib=0.02, speculative_model=speculative_model, num_speculative_tokens=count
    )
    executor = UniProcessExecutor(config, folder)
    limits = LiveLimits(max_num_batched_tokens=512, max_num_seqs=8, max_prefill_tokens_while_decoding=64)
    engine, collector = Engine(executor, limits), Collector()
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    prompt = tokenizer.encode("Once upon a time, there was a little fox who lived in a forest.")
    sampling = SamplingParams(temperature=temperature, max_tokens=60, seed=1, n=3, ignore_eos=True)
    collector.take(engine.add(EngineRequest(request_id="story", prompt_token_ids=prompt, sampling=sampling)))
    while engine.has_work():
        collector.take(engine.step())
    stats = engine.stats()
    engine.shutdown()
    return [collector.tokens["story", index] for index in range(3)], stats


@pytest.fixture(scope="module", params=[0.0, 0.8], ids=["greedy", "temperature 0.8"])
def temperature(request: pytest.FixtureRequest) -> float:
    value: float = request.param
    return value


@pytest.fixture(scope="module")
def plain(temperature: float) -> list[list[int]]:
    return embedded("", 0, temperature)[0]


@pytest.mark.parametrize(
    ("model", "count", "floor"), [(EMBEDDED_DRAFT, 4, 0.4), (EMBEDDED_DRAFT, 0, 0.0), (NGRAM, 3, 0.0)]
)
def test_the_embedded_model_speculates(
    plain: list[list[int]], temperature: float, model: str, count: int, floor: float
) -> None:
    folder = model if model == NGRAM else str(resolve_model(model))
    stories, stats = embedded(folder, count, temperature)
    assert stories == plain
    assert stats.accepted_draft_tokens >= floor * stats.draft_tokens
    if floor:
        assert stats.draft_tokens > 100
