"""Windows, perplexity and divergence on models whose answers are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ConfigError, EngineError
from penstock.core.types import SamplingParams
from penstock.workbench.evals.divergence import best_token, measure_divergence, position_divergence
from penstock.workbench.evals.perplexity import measure_perplexity
from penstock.workbench.evals.scoring import standard_error
from penstock.workbench.evals.texts import Window, read_documents, split_document


@dataclass
class Alternative:
    token_id: int
    logprob: float


@dataclass
class Position:
    token_id: int
    logprob: float | None
    top: list[Alternative] = field(default_factory=list)


@dataclass
class Result:
    prompt_logprobs: list[Position] | None
    error: Exception | None = None


class Unigram:
    """A model that gives every token its own probability, whatever came before."""

    def __init__(self, probabilities: Sequence[float], error: Exception | None = None) -> None:
        self._probabilities = probabilities
        self._error = error
        self.prompts: list[list[int]] = []

    def generate(self, prompts: Sequence[str | list[int]], sampling_params: SamplingParams) -> list[Result]:
        assert sampling_params.max_tokens == 0
        results = []
        for prompt in prompts:
            assert isinstance(prompt, list)
            self.prompts.append(prompt)
            positions = [self._position(token, sampling_params.prompt_logprobs or 0) for token in prompt]
            positions[0] = Position(prompt[0], None)
            results.append(Result(positions, self._error))
        return results

    def _position(self, token: int, alternatives: int) -> Position:
        ranked = sorted(range(len(self._probabilities)), key=lambda t: -self._probabilities[t])[:alternatives]
        top = [Alternative(t, math.log(self._probabilities[t])) for t in ranked]
        return Position(token, math.log(self._probabilities[token]), top)


@given(
    length=st.integers(0, 60),
    window=st.integers(2, 20),
    stride=st.integers(1, 19),
    bos=st.none() | st.just(999),
)
def test_every_token_but_the_first_is_scored_once(length: int, window: int, stride: int, bos: int | None) -> None:
    stride = min(stride, window - 1)
    document = list(range(length))
    windows = list(split_document(document, window, stride, bos))
    scored = [token for part in windows for token in part.token_ids[part.first_scored :]]
    assert scored == document[1:]
    for part in windows:
        assert len(part.token_ids) <= window
        assert part.first_scored >= 1
        assert part.num_scored <= max(stride, window - 1)
        tokens = part.token_ids[1:] if part.token_ids[0] == 999 else part.token_ids
        assert all(after == before + 1 for before, after in itertools.pairwise(tokens))


def test_later_windows_have_as_much_context_as_fits() -> None:
    windows = list(split_document(range(10), window=4, stride=2, bos_token_id=99))
    assert windows[0] == Window([0, 1, 2, 3], 1)
    assert windows[1:3] == [Window([99, 3, 4, 5], 2), Window([99, 5, 6, 7], 2)]
    assert list(split_document(range(5), window=4, stride=3)) == [Window([0, 1, 2, 3], 1), Window([1, 2, 3, 4], 3)]
    with pytest.raises(ValueError, match="stride"):
        next(split_document(range(5), window=4, stride=4))


def test_perplexity_of_a_known_distribution() -> None:
    model = Unigram([0.5, 0.25, 0.125, 0.125])
    windows = [Window([0, 0, 1, 2], 1), Window([3, 3, 1], 2)]
    result = measure_perplexity(model, windows)
    losses = [math.log(2), math.log(4), math.log(8), math.log(4)]
    assert (result.tokens, result.windows) == (4, 2)
    assert result.nll_per_token == pytest.approx(sum(losses) / 4)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 4))
    assert model.prompts == [[0, 0, 1, 2], [3, 3, 1]]


def test_many_windows_are_all_scored() -> None:
    windows = [Window([0, i % 4], 1) for i in range(200)]
    result = measure_perplexity(Unigram([0.25] * 4), windows)
    assert result.tokens == result.windows == 200
    assert result.perplexity == pytest.approx(4.0)
    assert result.standard_error == pytest.approx(0.0, abs=1e-9)


def test_standard_error_takes_windows_as_the_units() -> None:
    # Means 1 and 3 of two equal windows: the deviation of the mean is |1 - 3| / 2 whatever the number of tokens.
    assert standard_error([(10.0, 10), (30.0, 10)], 2.0) == pytest.approx(1.0)
    assert math.isnan(standard_error([(10.0, 10)], 1.0))
    losses = [math.log(2), math.log(4)]
    one_window = measure_perplexity(Unigram([0.5, 0.25, 0.25]), [Window([0, 0, 1], 1)])
    assert one_window.standard_error == pytest.approx(one_window.perplexity * (losses[1] - losses[0]) / 2)


def test_nothing_to_score_and_failing_requests() -> None:
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        measure_perplexity(Unigram([1.0]), [])
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        measure_divergence(Unigram([1.0]), Unigram([1.0]), [])
    with pytest.raises(EngineError, match="broken"):
        measure_perplexity(Unigram([1.0], EngineError("broken")), [Window([0, 0], 1)])


def test_divergence_of_known_distributions() -> None:
    p, q = [0.5, 0.25, 0.125, 0.125], [0.25, 0.5, 0.125, 0.125]
    windows = [Window([0, 1, 2], 1), Window([3, 0, 1, 2], 2)]
    result = measure_divergence(Unigram(p), Unigram(q), windows)
    assert result.tokens == 4
    assert result.kl_divergence == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert result.top1_agreement == 0.0
    same = measure_divergence(Unigram(p), Unigram(p), windows)
    assert (same.kl_divergence, same.top1_agreement) == (0.0, 1.0)


def distributions(size: int) -> st.SearchStrategy[list[float]]:
    weights = st.lists(st.floats(0.01, 1.0), min_size=size, max_size=size)
    return weights.map(lambda values: [value / sum(values) for value in values])


@given(p=distributions(40), q=distributions(40), token=st.integers(0, 39))
def test_divergence_of_the_best_tokens_is_a_lower_bound(p: list[float], q: list[float], token: int) -> None:
    reference, model = (Unigram(values)._position(token, 20) for values in (p, q))
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert 0 <= position_divergence(reference, model) <= exact + 1e-9


def test_equally_likely_tokens_have_one_winner() -> None:
    assert best_token(Position(0, None, [Alternative(7, -1.0), Alternative(3, -1.0), Alternative(9, -2.0)])) == 3


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 1}\n{"text": " "}\n', encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("Füße".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"tex', encoding="utf-8")
    (tmp_path / "other.jsonl").write_text('{"text": "one"}\n{"prompt": "two"}\n', encoding="utf-8")
    return tmp_path


def test_documents(files: Path) -> None:
    assert read_documents(str(files / "a.txt"), "--text") == ["one\n\ntwo\n"]
    assert read_documents(str(files / "b.jsonl"), "--text") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.txt", "--text .*absent.txt cannot be read: No such file"),
        ("empty.txt", "has no text"),
        ("latin.txt", "is not UTF-8 text"),
        ("broken.jsonl", "line 2 is not valid JSON"),
        ("other.jsonl", 'line 2 must be an object with the text in "text"'),
    ],
)
def test_documents_that_cannot_be_used(files: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_documents(str(files / name), "--text")
