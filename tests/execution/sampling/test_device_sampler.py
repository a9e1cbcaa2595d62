"""Sampling on the device gives the tokens of Sampler: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from penstock.core.errors import ConfigError, IntegrityError
from penstock.core.types import SamplingParams, TokenLogprobs
from penstock.execution.sampling.device_sampler import DeviceSampler, DeviceSamples
from penstock.execution.sampling.masks import TokenMasks
from penstock.execution.sampling.sampler import SampledRows, Sampler
from penstock.execution.sampling.verification import DraftRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []

EOS = (2,)
# Two blocks of tokens, the second of them not full.
VOCAB_SIZE = 2300
FILTERS = [
    SamplingParams(temperature=0.4),
    SamplingParams(min_p=0.02),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7, min_p=0.3),
    SamplingParams(temperature=1.5, top_k=700),
    SamplingParams(top_p=0.3),
    SamplingParams(temperature=0.4, top_p=0.9),
    SamplingParams(temperature=1.5, top_p=0.95, min_p=0.01),
    SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
    SamplingParams(temperature=1.2, top_k=300, top_p=0.5, min_p=0.001),
]


@dataclass
class Pair:
    """The same requests in both samplers, in slots of their order."""

    params: list[SamplingParams]
    vocab_size: int = VOCAB_SIZE
    prompt: list[int] = field(default_factory=lambda: [5, 6, 6])
    output: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        slots = len(self.params)
        self.device = DeviceSampler(self.vocab_size, slots, DEVICE, EOS)
        self.definition = Sampler(self.vocab_size, slots, torch.device("cpu"), EOS)
        for slot in range(slots):
            self.add(slot, self.params[slot])

    def add(self, slot: int, params: SamplingParams) -> None:
        for sampler in (self.device, self.definition):
            sampler.add(
                slot,
                params,
                seed=1000 * slot - 3,
                sample_index=slot % 3,
                prompt=np.array(self.prompt, dtype=np.int32),
                output=np.array(self.output, dtype=np.int32),
            )

    def sample(
        self, logits: Tensor, position: int, slots: list[int] | None = None
    ) -> tuple[DeviceSamples, SampledRows]:
        chosen = np.array(range(len(self.params)) if slots is None else slots, dtype=np.int64)
        positions = np.full(len(chosen), position, dtype=np.int64)
        with torch.inference_mode():
            sampled = self.device.launch(
                logits.to(DEVICE, copy=True),
                chosen,
                torch.from_numpy(chosen).to(DEVICE),
                torch.from_numpy(positions).to(DEVICE),
            )
        return sampled, self.definition.sample(logits.float().clone(), chosen, positions)


def _random_logits(rows: int, vocab_size: int = VOCAB_SIZE, spread: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def _separated_logits(rows: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    """Every token has another probability, by a factor of at least e ** 0.02."""
    generator = torch.Generator().manual_seed(rows)
    return torch.stack([torch.randperm(vocab_size, generator=generator) * 0.02 for _ in range(rows)])


def _differing(sampled: DeviceSamples, expected: SampledRows) -> list[int]:
    assert sampled.failed.tolist() == expected.failed.tolist()
    return np.flatnonzero(sampled.token_ids.cpu().numpy() != expected.token_ids).tolist()


def test_filters_on_separated_logits() -> None:
    pair = Pair([*FILTERS, SamplingParams(temperature=0.0)])
    assert _differing(*pair.sample(_separated_logits(len(pair.params)), 3)) == []


def test_filters_on_random_logits() -> None:
    pair = Pair(FILTERS, vocab_size=900)
    # Sums of probabilities are rounded in another order: a threshold or a draw may lie within 1e-6 of a border.
    assert len(_differing(*pair.sample(_random_logits(len(FILTERS), 900), 3))) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])])
def test_sixteen_bit_logits_with_their_ties(dtype: torch.dtype) -> None:
    params = [*FILTERS[::4], SamplingParams(temperature=0.0), SamplingParams(frequency_penalty=0.7, logprobs=2)]
    pair = Pair(params)
    logits = _random_logits(len(params), spread=3.0, seed=1).to(dtype)
    sampled, expected = pair.sample(logits, 4)
    assert _differing(sampled, expected) == []
    assert sampled.logprobs is not None
    assert expected.logprobs is not None
    assert sampled.logprobs.top_ids.tolist() == expected.logprobs.top_ids.tolist()


def test_equally_likely_tokens_stay_or_go_together() -> None:
    """Also more of them than one block hands on as candidates."""
    params = [
        SamplingParams(top_k=3, top_p=0.5),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=590, top_p=0.9),
        SamplingParams(temperature=0.0),
    ]
    pair = Pair(params, vocab_size=600)
    rows = len(params)
    for logits in (torch.zeros(rows, 600), _random_logits(rows, 600).round()):
        assert _differing(*pair.sample(logits, 7)) == []


def test_greedy_takes_the_lowest_id_of_the_largest() -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[0, [2200, 70, 2047]] = 4.0
    logits[1, [2299, 2048]] = 4.0
    sampled, _ = Pair([SamplingParams(temperature=0.0)] * 3).sample(logits, 0)
    assert sampled.token_ids.tolist() == [70, 2048, 0]
    assert sampled.logprobs is None


def test_penalties_follow_the_tokens_that_were_sampled() -> None:
    params = [
        SamplingParams(frequency_penalty=0.9, presence_penalty=0.3, repetition_penalty=1.2, temperature=0.9),
        SamplingParams(temperature=0.0, presence_penalty=1.5),
        SamplingParams(temperature=0.0),
        SamplingParams(repetition_penalty=0.7, min_p=0.1),
    ]
    pair = Pair(params, vocab_size=40, output=[7, 7, 9])
    logits = _random_logits(len(params), 40, spread=1.0, seed=3)
    seen = set()
    for step in range(6):
        sampled, expected = pair.sample(logits, 6 + step)
        assert _differing(sampled, expected) == []
        seen.add(int(sampled.token_ids[1]))
    assert len(seen) > 3  # the penalty bites
    assert len({int(token) for token in sampled.token_ids}) > 1


def test_biases_and_masks() -> None:
    params = [
        SamplingParams(temperature=0.0, logit_bias={1: 100.0, 3: -1.0}),
        SamplingParams(allowed_token_ids=(4, 8, 39), logit_bias={8: 1.5, 9: 50.0}),
        SamplingParams(temperature=0.0, stop_token_ids=(11, 12), min_tokens=4),
        SamplingParams(temperature=0.0, ignore_eos=True, frequency_penalty=1.0, stop_token_ids=(11, 12), min_tokens=4),
        SamplingParams(temperature=0.0),
    ]
    pair = Pair(params, vocab_size=40)
    logits = _random_logits(len(params), 40)
    logits[:, [2, 11, 12]] += torch.tensor([60.0, 40.0, 50.0])
    tokens = []
    for position in (3, 6, 7):
        sampled, expected = pair.sample(logits, position)
        assert _differing(sampled, expected) == []
        tokens.append(sampled.token_ids.tolist())
    assert tokens[0][0] == 1
    assert {row[1] for row in tokens} <= {4, 8, 39}
    assert [row[2] in (2, 11, 12) for row in tokens] == [False, False, True]
    assert [row[3] for row in tokens] == [2, 2, 2]


@dataclass
class Verification:
    """Drafts of some requests of a pair, and what they are verified with."""

    drafts: list[list[int]]
    logits: Tensor
    first_position: int = 6
    masks: TokenMasks | None = None

    @property
    def rows(self) -> DraftRows:
        return DraftRows(self.drafts)

    def plainly(self, pair: Pair) -> tuple[list[list[int]], list[bool], dict[int, list[TokenLogprobs]]]:
        """New tokens, failures and log-probabilities, one token and one request after the other, by the definition's `sample`."""
        tokens: list[list[int]] = [[] for _ in self.drafts]
        failed = [False] * len(self.drafts)
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for slot, start in enumerate(self.rows.start.tolist()):
            for offset in range(1 + len(self.drafts[slot])):
                row = self.logits[start + offset : start + offset + 1].clone()
                masks = None
                if self.masks is not None and start + offset in self.masks.rows:
                    masks = TokenMasks(np.array([0]), self.masks.bits[self.masks.rows == start + offset])
                position = np.array([self.first_position + offset])
                found = pair.definition.sample(row, np.array([slot]), position, masks)
                if found.failed[0]:
                    failed[slot], tokens[slot] = True, []
                    logprobs.pop(slot, None)
                    break
                tokens[slot].append(int(found.token_ids[0]))
                if found.logprobs is not None:
                    logprobs.setdefault(slot, []).extend(found.logprobs.to_structs(found.num_top))
                if tokens[slot][-1] != (*self.drafts[slot], -1)[offset]:
                    break
        return tokens, failed, logprobs

    def launch(self, pair: Pair) -> DeviceSamples:
        rows = self.rows
        with torch.inference_mode():
            return pair.device.launch_verify(
                self.logits.to(DEVICE, copy=True),
                np.arange(len(self.drafts)),
                torch.from_numpy(rows.request).to(DEVICE),
                torch.from_numpy(self.first_position + rows.offset).to(DEVICE),
                self.drafts,
                self.masks,
            )

    def check(self, pair: Pair) -> list[list[int]]:
        """The device's outcome is that of plain sampling; returns the new tokens."""
        sampled, rows = self.launch(pair), self.rows
        token_ids, failed_rows = sampled.token_ids.cpu().numpy(), sampled.failed.cpu().numpy()
        num_new, failed = rows.outcome(token_ids, failed_rows)
        tokens, expected_failed, logprobs = self.plainly(pair)
        assert failed.tolist() == expected_failed
        assert rows.new_tokens(token_ids, num_new, failed) == tokens
        for slot, entries in logprobs.items():
            found = sampled.logprobs
            assert found is not None
            for offset, entry in enumerate(entries):
                place = found.rows.tolist().index(rows.start[slot] + offset)
                assert float(found.logprobs[place]) == pytest.approx(entry.logprob, abs=2e-6)
                assert int(found.ranks[place]) == entry.rank
                assert found.top_ids[place, : len(entry.top)].tolist() == [token_id for token_id, _ in entry.top]
        return tokens


VERIFIED = [
    SamplingParams(temperature=0.0, logprobs=2),
    SamplingParams(temperature=0.8, frequency_penalty=0.9, repetition_penalty=1.2, logprobs=1),
    SamplingParams(temperature=0.9, top_k=9, stop_token_ids=(4, 5), min_tokens=5),
    SamplingParams(temperature=0.0, presence_penalty=1.5),
    SamplingParams(temperature=1.1, logit_bias={3: 2.0}),
]


def _alike(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Logits for the rows of requests with so many drafts, all much the same in each request, so that without penalties its tokens would be
    too; and those of one row each."""
    base = _random_logits(len(lengths), 40, spread=1.0, seed=seed)
    repeated = base.repeat_interleave(torch.tensor(lengths) + 1, dim=0)
    return repeated + _random_logits(len(repeated), 40, spread=0.01, seed=seed + 1), base


def _right_drafts(lengths: list[int], logits: Tensor) -> list[list[int]]:
    """What plain sampling gives, as far as each request's drafts go."""
    pair = Pair(VERIFIED, vocab_size=40, output=[7, 7, 9])
    drafts: list[list[int]] = [[] for _ in lengths]
    starts = DraftRows([[0] * length for length in lengths]).start
    for slot, length in enumerate(lengths):
        for offset in range(length):
            row = logits[starts[slot] + offset : starts[slot] + offset + 1].clone()
            token = pair.definition.sample(row, np.array([slot]), np.array([6 + offset])).token_ids[0]
            drafts[slot].append(int(token))
    return drafts


@pytest.mark.parametrize("wrong_from", [1, 3])
def test_drafts_give_the_tokens_of_one_row_after_the_other(wrong_from: int) -> None:
    """Also what is counted: the next step, without drafts, is that of the definition."""
    lengths = [3, 3, 2, 1, 0]
    logits, next_logits = _alike(lengths, seed=4)
    drafts = _right_drafts(lengths, logits)
    for some in drafts:
        some[wrong_from:] = [(token + 1) % 40 for token in some[wrong_from:]]
    pair = Pair(VERIFIED, vocab_size=40, output=[7, 7, 9])
    tokens = Verification(drafts, logits).check(pair)
    assert [len(some) for some in tokens] == [1 + min(wrong_from, length) for length in lengths]
    for position in (10, 11):
        assert _differing(*pair.sample(next_logits, position)) == []


def test_masks_and_failures_of_verified_rows() -> None:
    lengths = [2, 2, 2, 2, 0]
    logits = _random_logits(sum(lengths) + len(lengths), 40, spread=1.0, seed=6)
    drafts = _right_drafts(lengths, logits)
    bits = np.zeros((3, 5), dtype=np.uint8)
    bits[0, 1] = 2  # token 9
    bits[1, 4] = 0x81  # tokens 32 and 39
    masks = TokenMasks(np.array([0, 4, 12]), bits)
    drafts[0] = [9, 0]
    drafts[3] = [(drafts[3][0] + 1) % 40, 5]
    logits[7, 3] = torch.nan  # behind a draft that is right
    logits[10] = torch.nan  # behind one that is wrong
    verification = Verification(drafts, logits, masks=masks)
    tokens = verification.check(Pair(VERIFIED, vocab_size=40, output=[7, 7, 9]))
    assert tokens[0][0] == 9
    assert tokens[1][1] in (32, 39)
    assert [bool(some) for some in tokens] == [True, True, False, True, False]


def test_masks_of_another_vocabulary_are_refused() -> None:
    masks = TokenMasks(np.array([0]), np.zeros((1, 4), dtype=np.uint8))
    with pytest.raises(IntegrityError, match="masks"):
        Verification([[]], _random_logits(1, 40), masks=masks).launch(Pair(VERIFIED[:1], vocab_size=40))


def test_a_look_at_what_would_be_sampled_changes_nothing() -> None:
    pair = Pair(VERIFIED, vocab_size=40, output=[7, 7, 9])
    slots, positions = np.array([1, 3, 1, 4]), np.array([6, 6, 7, 6])
    logits = _random_logits(4, 40, spread=1.0, seed=7)
    logits[3, 2] = torch.nan
    for _ in range(2):
        found = pair.device.peek(logits.to(DEVICE, copy=True), slots, positions)
        assert found.tolist() == pair.definition.peek(logits.clone(), slots, positions).tolist()
        assert found[3] == 0
    assert _differing(*pair.sample(_random_logits(5, 40, spread=1.0, seed=8), 6)) == []


def test_rows_without_a_distribution_fail_alone() -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_p=0.9, logprobs=2),
        SamplingParams(),
        SamplingParams(allowed_token_ids=(3,)),
        SamplingParams(top_k=3),
        SamplingParams(temperature=0.0),
    ]
    pair = Pair(params, vocab_size=50)
    logits = _random_logits(len(params), 50)
    logits[0, 7] = torch.nan
    logits[1, 49] = torch.inf
    logits[2] = -torch.inf
    logits[3, 3] = -torch.inf
    logits[4, :46] = -torch.inf  # fewer tokens than top_k
    sampled, expected = pair.sample(logits, 2)
    assert sampled.failed.tolist() == [True, True, True, True, False, False]
    assert _differing(sampled, expected) == []
    assert sampled.logprobs is not None
    assert bool(sampled.logprobs.logprobs.isnan().all())


def test_logprobs_are_those_of_the_logits_as_they_came() -> None:
    params = [
        SamplingParams(logprobs=3, logit_bias={9: 100.0}),
        SamplingParams(temperature=0.0),
        SamplingParams(logprobs=0, temperature=0.0),
        SamplingParams(logprobs=20),
    ]
    pair = Pair(params)
    sampled, expected = pair.sample(_random_logits(len(params), seed=3), 3)
    found, wanted = sampled.logprobs, expected.logprobs
    assert found is not None
    assert wanted is not None
    assert found.rows.tolist() == [0, 2, 3]
    assert found.num_top == [3, 0, 20]
    assert int(sampled.token_ids[0]) == 9
    assert found.ranks.tolist() == wanted.ranks.tolist()
    assert found.top_ids.tolist() == wanted.top_ids.tolist()
    np.testing.assert_allclose(found.logprobs.cpu().numpy(), wanted.logprobs, atol=2e-6)
    np.testing.assert_allclose(found.top_logprobs.cpu().numpy(), wanted.top_logprobs, atol=2e-6)


def test_a_row_gives_the_same_token_alone_and_in_any_batch() -> None:
    pair = Pair(FILTERS[5:9], vocab_size=800)
    logits = _random_logits(len(pair.params), 800, seed=5)
    together = pair.sample(logits, 9)[0].token_ids.tolist()
    order = [3, 0]
    assert pair.sample(logits[order], 9, order)[0].token_ids.tolist() == [together[row] for row in order]
    assert pair.sample(logits[[2]], 9, [2])[0].token_ids.tolist() == [together[2]]


def test_slots_are_used_again() -> None:
    """What a slot held before is gone, however many requests with and without state of their own come and go."""
    biased = SamplingParams(temperature=0.0, logit_bias={1: 50.0}, presence_penalty=1.9)
    plain = SamplingParams(temperature=0.0)
    pair = Pair([plain] * 4, vocab_size=30)
    logits = _random_logits(4, 30, seed=8)
    for turn in range(5):
        for slot in range(4):
            pair.device.remove(slot)
            pair.definition.remove(slot)
            pair.add(slot, biased if (slot + turn) % 3 else plain)
        pair.add(turn % 4, plain)
        for step in range(2):
            assert _differing(*pair.sample(logits, 3 + step)) == []


def test_requests_that_leave_before_they_are_sampled_leave_nothing_behind() -> None:
    pair = Pair([SamplingParams(temperature=0.0, logit_bias={4: 80.0})] * 2, vocab_size=30)
    pair.device.remove(0)
    pair.definition.remove(0)
    pair.add(0, SamplingParams(temperature=0.0, allowed_token_ids=(7, 8)))
    sampled, expected = pair.sample(_random_logits(2, 30), 3)
    assert _differing(sampled, expected) == []
    assert int(sampled.token_ids[1]) == 4


def test_padding_rows_fail_and_touch_nothing() -> None:
    """As in a batch that is filled up to a captured size."""
    pair = Pair([SamplingParams(presence_penalty=1.0, top_k=5)], vocab_size=30)
    logits = _random_logits(3, 30).to(DEVICE)
    slots: npt.NDArray[np.int64] = np.array([0])
    sampled = pair.device.launch(
        logits, slots, torch.tensor([-1, 0, -1], device=DEVICE), torch.tensor([0, 3, 0], device=DEVICE)
    )
    assert sampled.failed.tolist() == [True, False, True]
    assert torch.equal(logits[[0, 2]].cpu(), _random_logits(3, 30)[[0, 2]])


def test_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocabulary"):
        DeviceSampler(2**20 + 1, 1, DEVICE)
