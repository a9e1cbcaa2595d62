"""Which rows of a verification have to wait for the tokens before them, and their numbers on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.execution.sampling.verification import BoolArray, DraftRows, IntArray


@dataclass(frozen=True)
class Wave:
    """Rows that are sampled together, one of each request that has as many drafts: int64 [P] on the device. drafts: int64 [P], what the
    row before each of them has to have sampled."""

    rows: Tensor
    drafts: Tensor


@dataclass(frozen=True)
class Waves:
    """In their order; later_rows: int64, all of theirs."""

    waves: list[Wave]
    later_rows: Tensor


def plan_waves(drafts: Sequence[Sequence[int]], counted: BoolArray, device: torch.device) -> Waves | None:
    """Waves for those of R requests that are `counted`, bool [R], with rows as DraftRows has them; None when every row can be sampled at
    once."""
    rows, lengths = DraftRows(drafts), np.array([len(some) for some in drafts])
    longest = int(lengths[counted].max(initial=0))
    if not longest:
        return None
    later = [rows.start[counted & (lengths >= place)] + place for place in range(1, longest + 1)]
    wanted = [rows.draft_behind[some - 1] for some in later]
    sent = send([np.concatenate(later), *later, *wanted], device)
    waves = [Wave(*pair) for pair in zip(sent[1 : 1 + longest], sent[1 + longest :], strict=True)]
    return Waves(waves, later_rows=sent[0])


def send(parts: Sequence[IntArray], device: torch.device) -> tuple[Tensor, ...]:
    """Arrays of int64 on the device, after one copy that nobody waits for."""
    packed = on_device(torch.from_numpy(np.concatenate(parts)), device)
    return torch.split(packed, [len(part) for part in parts])


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, through pinned memory, so that nobody waits; it must stay as it is."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
