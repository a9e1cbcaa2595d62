"""Compiles the kernels of step_inputs.py for GPUs that are not here; see testing/triton_compile.py."""

from __future__ import annotations

import torch

from penstock.execution.kernels.triton import step_inputs
from penstock.testing.triton_compile import check_resources, compile_only

SLOTS, REQUESTS, TOKENS, CONTEXT = 512, 256, 8192, 32_768


def make_tensors(block_size: int) -> step_inputs.StepTensors:
    blocks = CONTEXT // block_size + 1
    long = torch.empty(TOKENS, dtype=torch.int64)
    per_request = torch.empty(REQUESTS, dtype=torch.int64)
    return step_inputs.StepTensors(
        block_size=block_size,
        token_ids=torch.empty(SLOTS, CONTEXT + 1, dtype=torch.int32),
        block_table=torch.empty(SLOTS, blocks, dtype=torch.int32),
        input_ids=long,
        positions=long,
        slot_mapping=long,
        query_start=torch.empty(REQUESTS + 1, dtype=torch.int32),
        seq_lens=torch.empty(REQUESTS, dtype=torch.int32),
        block_tables=torch.empty(REQUESTS, blocks, dtype=torch.int32),
        request_slots=per_request,
        logit_rows=per_request,
        sample_slots=per_request,
        sample_positions=per_request,
        sampled=per_request,
    )


def compile_kernels(capability: int) -> None:
    staging = torch.empty(1 << 20, dtype=torch.int32)
    with compile_only(capability) as compiled:
        for block_size in (16, 24, 256):
            tensors = make_tensors(block_size)
            for num_requests in (1, 16, 255):
                step_inputs.prepare_inputs(
                    staging[: 5 * 260].view(5, 260),
                    tensors,
                    num_requests=num_requests,
                    num_tokens=num_requests,
                    max_count=1,
                    max_seq_len=CONTEXT,
                    filled_requests=num_requests + 1,
                    filled_tokens=num_requests * 4,
                    query_len=num_requests % 16,
                )
            runs = staging[1300:1308].view(2, 4)
            step_inputs.write_runs(tensors.token_ids, runs, staging[1308:], CONTEXT)
            step_inputs.write_runs(tensors.block_table, runs, staging[1308:], 1)
            for count in (1, 16, 255):
                chosen = torch.empty(count, dtype=torch.int64)
                step_inputs.append_tokens(tensors, chosen, torch.empty(count, dtype=torch.bool))
    check_resources(compiled)
    # What changes from step to step is no reason to compile again.
    assert len({kernel.ptx for kernel in compiled if kernel.name == "_prepare_kernel"}) == 3
    assert len({kernel.ptx for kernel in compiled if kernel.name == "_append_kernel"}) == 1
