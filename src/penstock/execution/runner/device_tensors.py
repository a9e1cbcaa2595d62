"""Memory of a batch on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.execution.kernels.triton.step_inputs import StepTensors


def allocate_tensors(
    device: torch.device,
    max_slots: int,
    max_requests: int,
    max_tokens: int,
    max_samples: int,
    max_model_len: int,
    block_size: int,
) -> StepTensors:
    """StepTensors of a batch: see there and DeviceBatch for the sizes. All zero but for slot_mapping: every row is padding."""
    num_blocks = max_model_len // block_size + 1

    def int32(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    def int64(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return StepTensors(
        block_size=block_size,
        # One more than the context, as in PersistentBatch.
        token_ids=int32(max_slots, max_model_len + 1),
        block_table=int32(max_slots, num_blocks),
        input_ids=int64(max_tokens),
        positions=int64(max_tokens),
        slot_mapping=int64(max_tokens) - 1,
        query_start=torch.arange(max_requests + 1, dtype=torch.int32, device=device),
        seq_lens=int32(max_requests),
        block_tables=int32(max_requests, num_blocks),
        request_slots=int64(max_requests),
        logit_rows=int64(max_samples),
        sample_slots=int64(max_samples),
        sample_positions=int64(max_samples),
        sampled=int64(max_samples),
    )
