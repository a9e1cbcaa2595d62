"""Sampling with torch's operators: on any device, and the twin of csrc/sampling.h."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.execution.sampling.draw import draw, row_maxima
from penstock.execution.sampling.filters import min_p_thresholds, scale_logits, thresholds
from penstock.execution.sampling.penalties import penalised
from penstock.execution.sampling.random import Stream, position_starts
from penstock.execution.sampling.requests import SamplingRequests
from penstock.execution.sampling.token_lists import TokenLists

IntArray = npt.NDArray[np.int64]


def torch_tokens(
    logits: Tensor, requests: SamplingRequests, slots: IntArray, positions: IntArray
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """A token for each row of logits, and which rows failed because they have no distribution (their token is 0).

    logits: float32 [M, V], may be overwritten; slots, positions: int64 [M].
    """
    with torch.inference_mode():  # what was made there may be overwritten only there
        edit_logits(logits, requests, slots, positions)
    maxima, token_ids = row_maxima(logits)
    # NaN and infinity survive every stage, and a row of nothing but forbidden tokens has a maximum of minus infinity.
    failed = ~torch.isfinite(maxima.squeeze(1))
    random_rows = np.flatnonzero(requests.records["temperature"][slots] > 0)
    if len(random_rows) == len(slots):
        token_ids = _draw(logits, maxima, requests, slots, positions)
    elif len(random_rows):
        index = torch.from_numpy(random_rows).to(logits.device)
        token_ids[index] = _draw(logits[index], maxima[index], requests, slots[random_rows], positions[random_rows])
    return token_ids.masked_fill(failed, 0).cpu().numpy(), failed.cpu().numpy()


def edit_logits(logits: Tensor, requests: SamplingRequests, slots: IntArray, positions: IntArray) -> None:
    """Penalties, biases and masks, in the documented order, in place; only the rows and tokens that they concern are touched."""
    records = requests.records[slots]
    device = logits.device
    rows, ids, counts = _entries(requests.used, slots, np.flatnonzero(records["used"]["count"]), device)
    if len(rows):
        presence, frequency, repetition = (
            torch.from_numpy(records[name].copy()).to(device)[rows] for name in ("presence", "frequency", "repetition")
        )
        logits[rows, ids] = penalised(
            logits[rows, ids], counts, presence=presence, frequency=frequency, repetition=repetition
        )
    rows, ids, values = _entries(requests.biased, slots, np.flatnonzero(records["biased"]["count"]), device)
    allowed = logits[rows, ids] + values
    restricted = np.flatnonzero(records["only_biased"])
    if len(restricted):
        # Adding it keeps what is not a number.
        logits[torch.from_numpy(restricted).to(device)] -= torch.inf
    if len(rows):
        logits[rows, ids] = allowed
    rows, ids, _ = _entries(requests.stops, slots, np.flatnonzero(positions < records["end_position"]), device)
    if len(rows):
        logits[rows, ids] = -torch.inf


def _entries(lists: TokenLists, slots: IntArray, rows: IntArray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of slots[rows], one after the other: rows int64 [N], token ids int64 [N] and values float32 [N]."""
    if not len(rows):
        return (torch.zeros(0, dtype=torch.int64, device=device),) * 2 + (torch.zeros(0, device=device),)
    ids = [lists.ids(slot) for slot in slots[rows].tolist()]
    values = [lists.values(slot) for slot in slots[rows].tolist()]
    row_of_entry = np.repeat(rows, [len(some) for some in ids])
    return (
        torch.from_numpy(row_of_entry).to(device),
        torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device),
        torch.from_numpy(np.concatenate(values)).to(device),
    )


def _draw(logits: Tensor, maxima: Tensor, requests: SamplingRequests, slots: IntArray, positions: IntArray) -> Tensor:
    """Random tokens, int64 [M], from processed logits [M, V] and their maxima [M, 1]."""
    records = requests.records[slots]
    vocab_size = logits.shape[1]
    temperature, top_k, top_p, min_p, keys = (
        torch.from_numpy(records[name].copy()).to(logits.device)
        for name in ("temperature", "top_k", "top_p", "min_p", "key")
    )
    scaled = scale_logits(logits, maxima, temperature)
    weights = scaled.exp()
    smallest = None
    if (records["top_k"] < vocab_size).any() or (records["top_p"] < 1.0).any():
        smallest = thresholds(scaled, weights, top_k, top_p, min_p)
    elif records["min_p"].any():
        smallest = min_p_thresholds(min_p)
    if smallest is not None:
        weights.masked_fill_(scaled < smallest.unsqueeze(1), 0.0)
    return draw(weights, position_starts(keys, torch.from_numpy(positions).to(logits.device), Stream.SAMPLE))
