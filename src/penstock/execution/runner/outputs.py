"""What a step says of its requests, whoever executed it: sampled tokens, failures, and log-probabilities of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.core.types import TokenLogprobs
from penstock.engine.step import RequestKey, RunnerOutput
from penstock.execution.runner.batch import IntArray, PersistentBatch, StepShape
from penstock.execution.sampling.verification import VerifiedTokens

NO_DISTRIBUTION = "The model gave no usable probabilities (NaN, infinite, or every token forbidden by the request)."


def sampling_keys(shape: StepShape) -> list[RequestKey]:
    """The requests that sample, in the order of `shape.sampling`."""
    if len(shape.sampling) == len(shape.keys):
        return shape.keys
    return [shape.keys[row] for row in shape.sampling.tolist()]


def add_samples(
    output: RunnerOutput,
    keys: list[RequestKey],
    token_ids: IntArray,
    failed: npt.NDArray[np.bool_],
    logprob_rows: IntArray,
    logprobs: list[TokenLogprobs],
) -> None:
    """Tokens [M] of the requests `keys`, or errors where `failed`; `logprobs` belong to the requests `logprob_rows` of them."""
    _add_failures(output, keys, failed)
    output.sampled_token_ids = {key: [token_id] for key, token_id in zip(keys, token_ids.tolist(), strict=True)}
    for key in output.errors:
        del output.sampled_token_ids[key]
    for row, entry in zip(logprob_rows.tolist(), logprobs, strict=True):
        if keys[row] not in output.errors:
            output.logprobs[keys[row]] = [entry]


def add_verified(output: RunnerOutput, keys: list[RequestKey], verified: VerifiedTokens) -> None:
    """The new tokens of the requests `keys`, or errors where they failed."""
    _add_failures(output, keys, verified.failed)
    for index, (key, token_ids) in enumerate(zip(keys, verified.token_ids, strict=True)):
        if key in output.errors:
            continue
        output.sampled_token_ids[key] = token_ids
        if index in verified.logprobs:
            output.logprobs[key] = verified.logprobs[index]


def _add_failures(output: RunnerOutput, keys: list[RequestKey], failed: npt.NDArray[np.bool_]) -> None:
    if failed.any():
        for row in np.flatnonzero(failed).tolist():
            output.errors[keys[row]] = NO_DISTRIBUTION
            output.prompt_logprobs.pop(keys[row], None)


@dataclass(frozen=True)
class PromptLogprobPlan:
    """Log-probabilities of prompt tokens that a step's hidden states predict.

    spans: request, position of the first entry, number of entries. rows, targets: int64 [N], the hidden state that predicts each token and
    the token, span after span; num_top: alternatives wanted for each.
    """

    spans: list[tuple[RequestKey, int, int]]
    rows: IntArray
    targets: IntArray
    num_top: list[int]

    def add_to(self, output: RunnerOutput, entries: Sequence[TokenLogprobs]) -> None:
        """Give each request its part of the N entries."""
        done = 0
        for key, first, count in self.spans:
            output.prompt_logprobs[key] = (first, list(entries[done : done + count]))
            done += count


def plan_prompt_logprobs(batch: PersistentBatch, shape: StepShape) -> PromptLogprobPlan | None:
    """What the step's requests want to know of their prompts; None when nothing.

    The hidden state of position p - 1 predicts the token at p, so a chunk of positions [start, end) has the entries for
    [start + 1, end + 1), as far as they are prompt tokens; the chunk before it had the one for `start`.
    """
    spans: list[tuple[RequestKey, int, int]] = []
    rows: list[IntArray] = []
    targets: list[npt.NDArray[np.int32]] = []
    num_top: list[int] = []
    for index in np.flatnonzero(batch.wants_prompt_logprobs[shape.slots]).tolist():
        key = shape.keys[index]
        request = batch.request(key)
        start = int(shape.starts[index])
        first = max(start + 1, request.prompt_logprobs_start, 1)
        last = min(int(shape.ends[index]) + 1, request.num_prompt_tokens)
        if first >= last:
            continue
        row = int(shape.query_start[index]) + first - 1 - start
        spans.append((key, first, last - first))
        rows.append(np.arange(row, row + last - first))
        targets.append(batch.token_ids(request.slot)[first:last])
        num_top += [request.sampling.prompt_logprobs or 0] * (last - first)
    if not spans:
        return None
    return PromptLogprobPlan(spans, np.concatenate(rows), np.concatenate(targets).astype(np.int64), num_top)
