"""A step's metadata from numbers of the host: where each token is, and where its key and value go."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.execution.attention.context import AttentionMetadata

IntArray = npt.NDArray[np.int64]


def token_places(starts: IntArray, query_start: IntArray) -> tuple[IntArray, IntArray]:
    """Of requests whose tokens begin at position `starts` [R] and, in the step, at `query_start` [R + 1]: which request each of the T
    tokens belongs to, and its position."""
    num_requests, num_tokens = len(starts), int(query_start[-1])
    if num_tokens == num_requests:
        return np.arange(num_requests), starts
    owners = np.repeat(np.arange(num_requests), np.diff(query_start))
    return owners, np.arange(num_tokens) + (starts - query_start[:-1])[owners]


def paged_metadata(
    query_start: IntArray,
    ends: IntArray,
    block_tables: npt.NDArray[np.int32],
    owners: IntArray,
    positions: IntArray,
    *,
    block_size: int,
    num_decodes: int,
    max_seq_len: int,
    device: torch.device,
) -> AttentionMetadata:
    """query_start, ends, block_tables as in AttentionMetadata (ends: its seq_lens), the last wide enough for all positions; owners,
    positions: see `token_places`."""
    block, offset = np.divmod(positions, block_size)
    slot_mapping = block_tables[owners, block].astype(np.int64) * block_size + offset
    query_start_host, seq_lens_host = query_start.astype(np.int32), ends.astype(np.int32)
    return AttentionMetadata(
        query_start=on_device(query_start_host, device),
        seq_lens=on_device(seq_lens_host, device),
        block_tables=on_device(block_tables, device),
        slot_mapping=on_device(slot_mapping, device),
        num_decodes=num_decodes,
        query_start_host=query_start_host,
        seq_lens_host=seq_lens_host,
        max_seq_len=max_seq_len,
    )


def on_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """`array` as a tensor; on a CPU it shares memory."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device)
