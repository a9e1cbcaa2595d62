"""What the host does with the tokens of a launched step when they have arrived."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from penstock.engine.step import RunnerOutput
from penstock.execution.runner.batch import IntArray, PersistentBatch, StepShape
from penstock.execution.runner.flight import Flight
from penstock.execution.runner.outputs import add_samples, add_verified, sampling_keys


def take_samples(
    flight: Flight, shape: StepShape, token_ids: IntArray, batch: PersistentBatch, later: Iterable[Flight]
) -> None:
    """Write the tokens, see Flight.tokens, down in the batch and add them to the output; from later steps in flight, take those requests
    out that failed."""
    keys, slots = sampling_keys(shape), shape.slots[shape.sampling]
    incarnations, positions = flight.incarnations[shape.sampling], shape.sample_positions
    # A slot may have been freed since, and taken by another request.
    current = batch.incarnations[slots] == incarnations
    if flight.drafts is None:
        failed = token_ids < 0
        add_samples(flight.output, keys, token_ids, failed, flight.logprob_rows, flight.sampled_logprobs(token_ids))
        good = current & ~failed
        batch.fill(slots[good], positions[good], token_ids[good])
    else:
        verified = flight.verified(token_ids, flight.drafts)
        add_verified(flight.output, keys, verified)
        failed = verified.failed
        for row in np.flatnonzero(current & ~failed).tolist():
            new_tokens = verified.token_ids[row]
            if flight.drafts[row]:
                batch.extend(int(slots[row]), new_tokens)
            else:
                # Counted at the launch.
                batch.fill(slots[row : row + 1], positions[row : row + 1], np.array(new_tokens))
    if failed.any():
        batch.set_broken(keys[row] for row in np.flatnonzero(current & failed).tolist())
        for step in later:
            step.dropped.update(incarnations[failed].tolist())


def drop_failed(output: RunnerOutput, flight: Flight, shape: StepShape) -> None:
    """Say nothing of requests that had failed before this step, which was in flight by then."""
    dropped: npt.NDArray[np.bool_] = np.isin(flight.incarnations, list(flight.dropped))
    for row in np.flatnonzero(dropped).tolist():
        key = shape.keys[row]
        for outcome in (output.sampled_token_ids, output.logprobs, output.prompt_logprobs, output.errors):
            outcome.pop(key, None)
