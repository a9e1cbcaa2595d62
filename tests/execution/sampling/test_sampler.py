import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.execution.sampling.sampler import SampledRows, Sampler
from tests.execution.sampling.reference_sampler import draw_token, kept_tokens, process, reference_start

CPU = torch.device("cpu")
EOS = (2,)


@dataclass
class Row:
    """One request and the logits of its next token."""

    params: SamplingParams
    logits: Tensor
    prompt: list[int]
    output: list[int]
    seed: int = 0
    sample_index: int = 0

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)


def _add(sampler: Sampler, slot: int, row: Row) -> None:
    sampler.add(
        slot,
        row.params,
        seed=row.seed,
        sample_index=row.sample_index,
        prompt=np.array(row.prompt, dtype=np.int32),
        output=np.array(row.output, dtype=np.int32),
    )


def _sample(rows: list[Row], slots: list[int] | None = None) -> SampledRows:
    vocab_size = len(rows[0].logits)
    slots = slots or list(range(len(rows)))
    sampler = Sampler(vocab_size, max(slots) + 1, CPU, EOS)
    for slot, row in zip(slots, rows, strict=True):
        _add(sampler, slot, row)
    logits = torch.stack([row.logits for row in rows])
    return sampler.sample(logits, np.array(slots), np.array([row.position for row in rows]))


@st.composite
def _rows(draw: st.DrawFn) -> list[Row]:
    vocab_size = draw(st.integers(4, 80))
    token = st.integers(0, vocab_size - 1)
    tokens = st.lists(token, max_size=8)
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.7])),
            top_k=draw(st.sampled_from([0, -1, 1, 3, 100, 500])),
            top_p=draw(st.sampled_from([1.0, 0.2, 0.9])),
            min_p=draw(st.sampled_from([0.0, 0.03, 0.5])),
            presence_penalty=draw(st.sampled_from([0.0, 0.0, -1.5, 0.7])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.5, 1.3])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.6, 1.4])),
            logit_bias=draw(
                st.dictionaries(st.integers(0, vocab_size + 5), st.sampled_from([-100.0, -1, 2, 50]), max_size=3)
            ),
            allowed_token_ids=draw(st.one_of(st.none(), st.lists(token, min_size=3, max_size=9).map(tuple))),
            stop_token_ids=tuple(draw(st.lists(st.integers(0, vocab_size + 5), max_size=3))),
            ignore_eos=draw(st.booleans()),
            min_tokens=draw(st.sampled_from([0, 0, 3])),
        )
        rows.append(
            Row(
                params,
                torch.randn(vocab_size, generator=generator) * 2,
                prompt=[*draw(tokens), 0],
                output=draw(tokens),
                seed=draw(st.integers(-(2**63), 2**63 - 1)),
                sample_index=draw(st.integers(0, 3)),
            )
        )
    return rows


@settings(max_examples=80, deadline=None, derandomize=True)
@given(_rows())
def test_every_row_is_sampled_as_the_reference_samples_it_alone(rows: list[Row]) -> None:
    sampled = _sample(rows)
    for index, row in enumerate(rows):
        logits = process(row.logits.tolist(), row.params, row.prompt, row.output, EOS)
        assert bool(sampled.failed[index]) == (max(logits) == -math.inf)
        if sampled.failed[index]:
            continue
        token_id = int(sampled.token_ids[index])
        if row.params.greedy:
            best = max(logits)
            assert logits[token_id] >= best - 1e-5
            continue
        kept, closest_filter = kept_tokens(logits, row.params)
        start = reference_start(row.seed, row.sample_index, row.position)
        expected, closest_draw = draw_token(logits, kept, row.params.temperature, start)
        assume(min(closest_filter, closest_draw) > 1e-5)
        assert token_id == expected


@settings(max_examples=30, deadline=None, derandomize=True)
@given(_rows())
def test_a_row_gives_the_same_token_alone_and_in_any_batch(rows: list[Row]) -> None:
    together = _sample(rows)
    backwards = _sample(rows[::-1], slots=list(range(3, 3 + len(rows))))
    alone = [int(_sample([row]).token_ids[0]) for row in rows]
    assert together.token_ids.tolist() == alone
    assert backwards.token_ids.tolist() == alone[::-1]


def test_penalties_follow_the_tokens_that_were_sampled() -> None:
    """Counting token by token gives what a request resumed from its whole output gives."""
    params = SamplingParams(frequency_penalty=0.9, presence_penalty=0.3, repetition_penalty=1.2, temperature=0.9)
    row = Row(params, torch.randn(40, generator=torch.Generator().manual_seed(4)), prompt=[1, 2, 2], output=[], seed=9)
    sampler = Sampler(40, 2, CPU, EOS)
    _add(sampler, 1, row)
    for _ in range(30):
        resumed = int(_sample([row]).token_ids[0])
        sampled = sampler.sample(row.logits.clone().unsqueeze(0), np.array([1]), np.array([row.position]))
        assert int(sampled.token_ids[0]) == resumed
        row.output.append(resumed)
    assert len(set(row.output)) > 15  # the penalties bite


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=1.5, top_k=12, top_p=0.9, min_p=0.05),
    ],
)
def test_frequencies_match_the_distribution(params: SamplingParams) -> None:
    n, vocab_size = 20_000, 16
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(5)) * 1.5
    sampler = Sampler(vocab_size, 1, CPU, EOS)
    _add(sampler, 0, Row(params, logits, prompt=[0], output=[], seed=1234))
    slots = np.zeros(n, dtype=np.int64)
    tokens = sampler.sample(logits.repeat(n, 1), slots, np.arange(1, n + 1)).token_ids
    counts = torch.bincount(torch.from_numpy(tokens), minlength=vocab_size)
    kept, _ = kept_tokens(logits.tolist(), params)
    weights = torch.zeros(vocab_size, dtype=torch.float64)
    weights[kept] = (logits.double()[kept] / params.temperature).exp()
    expected = n * weights / weights.sum()
    assert int(counts[expected == 0].sum()) == 0
    likely = expected > 5
    chi_square = float(((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum())
    freedom = max(1, int(likely.sum()) - 1)
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom)


def test_rows_without_a_distribution_fail_alone() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=2, frequency_penalty=1.0)
    good = torch.randn(100, generator=torch.Generator().manual_seed(6))
    rows = [Row(params, good.clone(), prompt=[0], output=[], seed=5) for _ in range(6)]
    rows[1].logits[7] = math.nan
    rows[2].logits[7] = math.inf
    rows[3].logits[:] = -math.inf
    rows[4].params = SamplingParams(allowed_token_ids=EOS, min_tokens=1)
    sampled = _sample(rows)
    assert sampled.failed.tolist() == [False, True, True, True, True, False]
    assert sampled.token_ids[0] == sampled.token_ids[5] == _sample([rows[0]]).token_ids[0]


def test_token_ids_outside_the_vocabulary_are_ignored() -> None:
    params = SamplingParams(
        temperature=0.0,
        logit_bias={10**9: 5.0, -4: 5.0, 3: 100.0},
        allowed_token_ids=(3, 10**6),
        stop_token_ids=(10**7,),
        min_tokens=2,
        presence_penalty=1.0,
    )
    sampled = _sample([Row(params, torch.zeros(10), prompt=[1, 2**31 - 1], output=[-5, 99])])
    assert sampled.token_ids.tolist() == [3]


def test_min_tokens_masks_stop_tokens_until_the_output_is_long_enough() -> None:
    logits = torch.zeros(8)
    logits[2], logits[5], logits[6] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(5,))

    def token_after(output: list[int], params: SamplingParams) -> int:
        return int(_sample([Row(params, logits.clone(), prompt=[0], output=output)]).token_ids[0])

    assert [token_after([7] * n, params) for n in range(4)] == [6, 6, 2, 2]
    ignoring = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(5,), ignore_eos=True)
    assert token_after([], ignoring) == 2


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(8))
    params = SamplingParams(temperature=0.0, logit_bias={4: 100.0}, logprobs=2)
    plain = SamplingParams(temperature=0.0)
    sampled = _sample([Row(plain, logits.clone(), [0], []), Row(params, logits.clone(), [0], [])])
    assert sampled.logprob_rows.tolist() == [1]
    assert sampled.logprobs is not None
    (entry,) = sampled.logprobs.to_structs(sampled.num_top)
    expected = torch.log_softmax(logits, 0)
    assert entry.token_id == 4
    assert entry.logprob == pytest.approx(float(expected[4]), abs=1e-5)
    assert entry.rank == 1 + int((logits > logits[4]).sum())
    assert [token_id for token_id, _ in entry.top] == torch.topk(logits, 2).indices.tolist()


def test_memory_follows_the_requests_that_need_it() -> None:
    sampler = Sampler(1000, 64, CPU, EOS)
    logits = torch.zeros(1000)
    requests = sampler._requests

    def tokens_held() -> int:
        return sum(int(requests.records[name]["count"].sum()) for name in ("used", "biased", "stops"))

    _add(sampler, 0, Row(SamplingParams(), logits, [0], []))
    assert tokens_held() == 0
    for slot in range(1, 11):
        params = SamplingParams(presence_penalty=1.0, logit_bias={1: 1.0}, min_tokens=3)
        _add(sampler, slot, Row(params, logits, [0, 0, 7], [3, 7]))
    assert tokens_held() == 10 * (3 + 1 + 1)
    for slot in range(11):
        sampler.remove(slot)
    assert tokens_held() == 0


def test_a_reused_slot_forgets_its_last_request() -> None:
    sampler = Sampler(20, 1, CPU, EOS)
    logits = torch.arange(20.0)
    used = SamplingParams(temperature=0.0, logit_bias={0: 100.0}, repetition_penalty=50.0, min_tokens=5, logprobs=1)
    _add(sampler, 0, Row(used, logits, list(range(20)), [1, 2]))
    assert int(sampler.sample(logits.clone().unsqueeze(0), np.array([0]), np.array([22])).token_ids[0]) == 0
    _add(sampler, 0, Row(SamplingParams(temperature=0.0), logits, [0], []))
    sampled = sampler.sample(logits.clone().unsqueeze(0), np.array([0]), np.array([1]))
    assert sampled.token_ids.tolist() == [19]
    assert sampled.logprobs is None
