import numpy as np
import torch

from penstock.core.types import TokenLogprobs
from penstock.execution.sampling.logprobs import prompt_token_logprobs, token_logprobs


def test_logprobs_ranks_and_alternatives() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    logits[2, 10:20] = 9.0  # ties: equal probability, ascending ids
    tokens = np.array([3, 0, 15, 49, 7])
    entries = token_logprobs(logits, tokens, 20).to_structs([20, 0, 5, 1, 3])
    expected = torch.log_softmax(logits.double(), dim=1)
    for row, entry in enumerate(entries):
        assert entry.token_id == tokens[row]
        assert abs(entry.logprob - float(expected[row, entry.token_id])) < 1e-5
        assert entry.rank == 1 + int((expected[row] > expected[row, entry.token_id]).sum())
        best = sorted(range(50), key=lambda i, row=row: (-float(logits[row, i]), i))  # type: ignore[misc]
        if row != 2:
            assert [token_id for token_id, _ in entry.top] == best[: len(entry.top)]
        for token_id, logprob in entry.top:
            assert abs(logprob - float(expected[row, token_id])) < 1e-5
    assert [len(entry.top) for entry in entries] == [20, 0, 5, 1, 3]
    tied = [token_id for token_id, _ in token_logprobs(logits, tokens, 10).to_structs([10] * 5)[2].top]
    assert tied == list(range(10, 20))


def test_more_alternatives_than_vocabulary() -> None:
    (entry,) = token_logprobs(torch.zeros(1, 4), np.array([2]), 20).to_structs([20])
    assert [token_id for token_id, _ in entry.top] == [0, 1, 2, 3]
    assert entry.rank == 1


def test_prompt_logprobs_in_chunks_bound_the_logits_and_change_nothing() -> None:
    head = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    hidden = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    rows = np.arange(1, 38)
    tokens = np.arange(37) % 64
    num_top = [3, 0] * 18 + [1]
    sizes: list[int] = []

    def compute_logits(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part @ head

    def run(max_logits_bytes: int) -> list[TokenLogprobs]:
        return prompt_token_logprobs(
            hidden,
            rows,
            tokens,
            num_top,
            compute_logits=compute_logits,
            vocab_size=64,
            max_logits_bytes=max_logits_bytes,
        )

    whole = run(2**20)
    assert sizes == [37]
    sizes.clear()
    chunked = run(5 * 64 * 4)
    assert sizes == [5] * 7 + [2]
    sizes.clear()
    single = run(1)
    assert sizes == [1] * 37
    for parts in (chunked, single):
        for entry, expected in zip(parts, whole, strict=True):
            assert (entry.token_id, entry.rank) == (expected.token_id, expected.rank)
            assert abs(entry.logprob - expected.logprob) < 1e-5
            assert [i for i, _ in entry.top] == [i for i, _ in expected.top]
