"""Verifying drafts gives what plain decoding gives, to the last bit, whatever was drafted."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.errors import IntegrityError
from penstock.core.types import SamplingParams, TokenLogprobs
from penstock.execution.kernels.native import native_available
from penstock.execution.sampling import masks as masks_module
from penstock.execution.sampling import sampler as sampler_module
from penstock.execution.sampling.masks import TokenMasks, forbid, torch_forbid
from penstock.execution.sampling.sampler import Sampler
from penstock.execution.sampling.verification import VerifiedTokens

CPU = torch.device("cpu")
EOS = (2,)
PATHS = pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])


@dataclass
class Case:
    """One request, the logits behind its last token and behind each draft, and which tokens are allowed there."""

    params: SamplingParams
    logits: Tensor
    prompt: list[int]
    output: list[int]
    seed: int
    sample_index: int
    right_drafts: int
    last_draft: int
    allowed: np.ndarray | None

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)


@dataclass
class Plain:
    """What decoding token by token gave."""

    token_ids: list[int]
    failed: bool
    logprobs: list[TokenLogprobs]


@st.composite
def _params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    tokens = st.lists(st.integers(0, vocab_size - 1), min_size=3, max_size=9)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 3, 100])),
        top_p=draw(st.sampled_from([1.0, 0.9])),
        min_p=draw(st.sampled_from([0.0, 0.03])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.5, 1.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.4])),
        logit_bias=draw(st.dictionaries(st.integers(0, vocab_size - 1), st.sampled_from([-100.0, 2.0]), max_size=3)),
        allowed_token_ids=draw(st.one_of(st.none(), st.none(), tokens.map(tuple))),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, vocab_size - 1), max_size=2))),
        min_tokens=draw(st.sampled_from([0, 0, 3])),
        logprobs=draw(st.sampled_from([None, None, 0, 4])),
    )


@st.composite
def _cases(draw: st.DrawFn) -> list[Case]:
    vocab_size = draw(st.integers(6, 80))
    token = st.integers(0, vocab_size - 1)
    cases = []
    for _ in range(draw(st.integers(1, 5))):
        rows = 1 + draw(st.integers(0, 4))
        numbers = np.random.default_rng(draw(st.integers(0, 2**31)))
        logits = torch.from_numpy(numbers.normal(size=(rows, vocab_size)).astype(np.float32) * 2)
        if draw(st.integers(0, 5)) == 0:
            logits[draw(st.integers(0, rows - 1)), draw(token)] = math.nan
        allowed = None
        if draw(st.booleans()):
            allowed = numbers.random((rows, vocab_size)) < 0.7
        cases.append(
            Case(
                draw(_params(vocab_size)),
                logits,
                prompt=[*draw(st.lists(token, max_size=8)), 0],
                output=draw(st.lists(token, max_size=4)),
                seed=draw(st.integers(-(2**63), 2**63 - 1)),
                sample_index=draw(st.integers(0, 3)),
                right_drafts=draw(st.integers(0, rows - 1)),
                last_draft=draw(token),
                allowed=allowed,
            )
        )
    return cases


def _without_native(patch: pytest.MonkeyPatch) -> None:
    for module in (sampler_module, masks_module):
        patch.setattr(module, "native_available", lambda: False)


def _sampler_of(cases: list[Case]) -> Sampler:
    sampler = Sampler(cases[0].logits.shape[1], 2 * len(cases) + 1, CPU, EOS)
    for index, case in enumerate(cases):
        sampler.add(
            _slot(index),
            case.params,
            seed=case.seed,
            sample_index=case.sample_index,
            prompt=np.array(case.prompt, dtype=np.int32),
            output=np.array(case.output, dtype=np.int32),
        )
    return sampler


def _slot(index: int) -> int:
    return 2 * index + 1


def _masks(allowed: list[np.ndarray | None]) -> TokenMasks | None:
    rows = [row for row, some in enumerate(allowed) if some is not None]
    if not rows:
        return None
    bits = np.packbits(np.stack([some for some in allowed if some is not None]), axis=1, bitorder="little")
    return TokenMasks(np.array(rows, dtype=np.int64), bits)


def _one_by_one(sampler: Sampler, index: int, case: Case, drafts: list[int] | None = None) -> Plain:
    """Decode with the rows of a case in turn, as long as they were computed from what was sampled (`drafts`; None: always)."""
    plain = Plain([], False, [])
    for offset, row in enumerate(case.logits):
        sampled = sampler.sample(
            row.clone().unsqueeze(0),
            np.array([_slot(index)]),
            np.array([case.position + offset]),
            _masks([None if case.allowed is None else case.allowed[offset]]),
        )
        if sampled.failed[0]:
            return Plain([], True, [])
        plain.token_ids += sampled.token_ids.tolist()
        if sampled.logprobs is not None:
            plain.logprobs += sampled.logprobs.to_structs(sampled.num_top)
        if drafts is not None and drafts[offset : offset + 1] != plain.token_ids[-1:]:
            break
    return plain


def _verify(sampler: Sampler, cases: list[Case], drafts: list[list[int]]) -> VerifiedTokens:
    allowed = [None if case.allowed is None else case.allowed[row] for case in cases for row in range(len(case.logits))]
    return sampler.verify(
        torch.cat([case.logits for case in cases]),
        np.array([_slot(index) for index in range(len(cases))]),
        np.array([case.position for case in cases]),
        drafts,
        _masks(allowed),
    )


def _drafts_of(cases: list[Case]) -> list[list[int]]:
    """The first drafts of a request are what it will sample, the others are the same token."""
    sampler = _sampler_of(cases)
    drafts = []
    for index, case in enumerate(cases):
        right = _one_by_one(sampler, index, case).token_ids[: case.right_drafts]
        drafts.append(right + [case.last_draft] * (len(case.logits) - 1 - len(right)))
    return drafts


@PATHS
@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases=_cases())
def test_verified_tokens_are_those_of_decoding_one_by_one(native: bool, cases: list[Case]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            _without_native(patch)
        drafts = _drafts_of(cases)
        plain_sampler, sampler = _sampler_of(cases), _sampler_of(cases)
        expected = [_one_by_one(plain_sampler, index, case, drafts[index]) for index, case in enumerate(cases)]
        verified = _verify(sampler, cases, drafts)
        assert verified.token_ids == [plain.token_ids for plain in expected]
        assert verified.failed.tolist() == [plain.failed for plain in expected]
        assert verified.logprobs == {index: plain.logprobs for index, plain in enumerate(expected) if plain.logprobs}
        # What was counted shows in the tokens that follow.
        going = [index for index, plain in enumerate(expected) if not plain.failed]
        if going:
            logits = torch.randn(len(going), cases[0].logits.shape[1], generator=torch.Generator().manual_seed(1))
            slots = np.array([_slot(index) for index in going])
            positions = np.array([cases[index].position + len(verified.token_ids[index]) for index in going])
            after = [some.sample(logits.clone(), slots, positions).token_ids for some in (plain_sampler, sampler)]
            assert after[0].tolist() == after[1].tolist()


@PATHS
def test_penalties_count_accepted_drafts_within_the_step(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that want the same token again and again: with a penalty the second row must not take it."""
    if not native:
        _without_native(monkeypatch)
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(4, 1)
    params = SamplingParams(temperature=0.0, presence_penalty=1.5, logprobs=0)
    sampler = Sampler(4, 2, CPU)
    for slot in range(2):
        sampler.add(
            slot,
            params if slot else SamplingParams(temperature=0.0),
            seed=0,
            sample_index=0,
            prompt=np.array([0], dtype=np.int32),
            output=np.array([], dtype=np.int32),
        )
    slots, positions = np.array([0, 1]), np.array([1, 1])
    verified = sampler.verify(logits.repeat(2, 1), slots, positions, [[1, 1, 1], [1, 2, 2]])
    # 3 2 1, then 1.5 2 1, then 1.5 0.5 1, the second draft of token 2 is refused
    assert verified.token_ids == [[1, 1, 1, 1], [1, 2, 1]]
    assert [entry.logprob for entry in verified.logprobs[1]] == pytest.approx(
        torch.log_softmax(logits[0], 0)[[1, 2, 1]].tolist()
    )
    assert list(verified.logprobs) == [1]


def test_a_row_without_a_distribution_fails_only_where_it_counts() -> None:
    logits = torch.zeros(6, 4)
    logits[:, 1] = 5.0
    logits[2, 3] = logits[4, 3] = math.nan
    sampler = Sampler(4, 2, CPU)
    for slot in range(2):
        empty = np.array([], dtype=np.int32)
        sampler.add(slot, SamplingParams(temperature=0.0), seed=0, sample_index=0, prompt=empty, output=empty)
    verified = sampler.verify(logits, np.array([0, 1]), np.array([0, 0]), [[2, 0], [1, 0]])
    assert verified.token_ids == [[1], []]
    assert verified.failed.tolist() == [False, True]


@PATHS
def test_peeking_changes_nothing(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        _without_native(monkeypatch)
    params = SamplingParams(temperature=0.8, frequency_penalty=1.0, repetition_penalty=1.3, logprobs=1)
    sampler, other = Sampler(50, 2, CPU), Sampler(50, 2, CPU)
    for some in (sampler, other):
        prompt = np.array([3, 4], dtype=np.int32)
        some.add(1, params, seed=5, sample_index=0, prompt=prompt, output=np.array([7], dtype=np.int32))
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(3))
    peeked = sampler.peek(logits.clone(), np.array([1] * 8), np.arange(3, 11))
    assert peeked.tolist() == sampler.peek(logits.clone(), np.array([1] * 8), np.arange(3, 11)).tolist()
    first = sampler.sample(logits[:1].clone(), np.array([1]), np.array([3]))
    assert first.token_ids.tolist() == peeked[:1].tolist()
    assert first.token_ids.tolist() == other.sample(logits[:1].clone(), np.array([1]), np.array([3])).token_ids.tolist()


@PATHS
@pytest.mark.parametrize("vocab_size", [8, 13, 300])
def test_masks_forbid_and_keep_what_is_broken(native: bool, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        _without_native(monkeypatch)
    numbers = np.random.default_rng(7)
    logits = torch.from_numpy(numbers.normal(size=(4, vocab_size)).astype(np.float32))
    allowed = numbers.random((4, vocab_size)) < 0.4
    allowed[:, 5] = True
    allowed[2:, 3] = False
    logits[2, 3], logits[3, 3] = math.nan, math.inf
    sampler = Sampler(vocab_size, 4, CPU)
    for slot in range(4):
        empty = np.array([], dtype=np.int32)
        # What a mask forbids no bias brings back.
        params = SamplingParams(temperature=0.0, logit_bias={4: 100.0}, logprobs=0)
        sampler.add(slot, params, seed=slot, sample_index=0, prompt=empty, output=empty)
    allowed[:, 4] = False
    raw = logits[:2].clone()
    sampled = sampler.sample(logits, np.arange(4), np.zeros(4, dtype=np.int64), _masks(list(allowed)))
    assert sampled.failed.tolist() == [False, False, True, True]
    expected = raw.masked_fill(torch.from_numpy(~allowed[:2]), -torch.inf).argmax(dim=1)
    assert sampled.token_ids[:2].tolist() == expected.tolist()
    assert sampled.logprobs is not None
    own = torch.log_softmax(raw, 1).gather(1, expected.unsqueeze(1)).squeeze(1)
    assert sampled.logprobs.logprobs[:2].tolist() == pytest.approx(own.tolist(), abs=1e-5)


@pytest.mark.skipif(not native_available(), reason="there are no native kernels here")
@pytest.mark.parametrize("vocab_size", [1, 8, 29, 5000])
def test_the_native_mask_is_its_twin(vocab_size: int) -> None:
    numbers = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(numbers.normal(size=(40, vocab_size + 3)).astype(np.float32))
    logits[5, 0], logits[6, 0], logits[7, 0] = math.nan, math.inf, -math.inf
    rows = np.array([0, 3, 5, 6, 7, *range(10, 40)])
    bits = numbers.integers(0, 256, (len(rows), (vocab_size + 7) // 8), dtype=np.uint8)
    bits[1], bits[2] = 0, 255
    masks = TokenMasks(rows, bits)
    expected = logits[:, :vocab_size].clone()
    padding = logits[:, vocab_size:].clone()
    torch_forbid(expected, masks)
    forbid(logits[:, :vocab_size], masks)
    assert torch.allclose(logits[:, :vocab_size], expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(logits[:, vocab_size:], padding)


def test_masks_of_another_vocabulary_are_refused() -> None:
    sampler = Sampler(20, 1, CPU)
    empty = np.array([], dtype=np.int32)
    sampler.add(0, SamplingParams(), seed=0, sample_index=0, prompt=empty, output=empty)
    masks = TokenMasks(np.array([0]), np.zeros((1, 2), dtype=np.uint8))
    with pytest.raises(IntegrityError, match="20 tokens"):
        sampler.sample(torch.zeros(1, 20), np.array([0]), np.array([0]), masks)
