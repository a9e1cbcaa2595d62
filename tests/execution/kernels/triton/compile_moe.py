"""Compiles the kernels of mixtures of experts for GPUs that are not here; see testing/triton_compile.py."""

from __future__ import annotations

import torch

from penstock.execution.kernels.moe import Routing
from penstock.execution.kernels.quantized import CodebookTensor, CompactWeight, Float8Tensor, QuantizedTensor
from penstock.execution.kernels.triton import linear_pack
from penstock.execution.kernels.triton.moe import GroupedExperts
from penstock.execution.kernels.triton.moe_gemm import GroupedFloats, GroupedWeight, group_codes
from penstock.testing.triton_compile import check_resources, compile_only

CPU = torch.device("cpu")
# Qwen3-30B-A3B: experts, of a token, hidden size, size of an expert. Memory is never touched, so few experts stand for all.
ROUTING, HIDDEN, INNER = Routing(128, 8, True), 2048, 768
PRESENT = 2


def weight(form: str, rows: int, columns: int) -> GroupedWeight:
    if form in ("bfloat16", "float16", "float32"):
        return GroupedFloats(torch.empty(PRESENT, rows, columns, dtype=getattr(torch, form)))
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales = torch.zeros(rows, columns // 128)
    forms: dict[str, CompactWeight] = {
        "int4": QuantizedTensor(codes, 4, 128, scales),
        "int4 offsets": QuantizedTensor(codes, 4, 128, scales, scales, torch.arange(columns)),
        "int8": QuantizedTensor(codes, 8, columns, scales[:, :1]),
        "codebook": CodebookTensor(codes, torch.zeros(16), 64, torch.zeros(rows, columns // 64)),
        "float8": Float8Tensor(
            codes.view(torch.float8_e4m3fn), (128, 128), torch.zeros(-(-rows // 128), columns // 128)
        ),
    }
    grouped = group_codes([linear_pack.pack(forms[form], CPU)] * PRESENT)
    assert grouped is not None
    return grouped


# Numbers of tokens, one for each number of rows of a block.
TOKENS = {
    80: {"bfloat16": (1, 300, 1000), "int4": (1, 1000), "int8": (1, 1000), "codebook": (1000,), "float8": (1, 1000)},
    90: {
        "bfloat16": (1, 300, 1000, 4000),
        "float16": (4000,),
        "float32": (300,),
        "int4": (1, 300, 4000),
        "int4 offsets": (1, 4000),
        "int8": (1, 4000),
        "codebook": (1, 4000),
        "float8": (1, 4000),
    },
}
# The most common forms, and the tiles that have the fewest registers to spare.
SOME_TOKENS: dict[int, dict[str, tuple[int, ...]]] = {
    80: {"bfloat16": (1000,), "int4": (1,)},
    90: {"bfloat16": (1, 4000), "int4": (4000,)},
}


def compile_kernels(capability: int, *, everything: bool) -> None:
    with compile_only(capability) as compiled:
        for form, batches in (TOKENS if everything else SOME_TOKENS)[capability].items():
            dtype = getattr(torch, form) if form in ("float16", "float32") else torch.bfloat16
            experts = GroupedExperts(ROUTING, 0, PRESENT, weight(form, 2 * INNER, HIDDEN), weight(form, HIDDEN, INNER))
            for tokens in batches:
                experts(torch.empty(tokens, HIDDEN, dtype=dtype), torch.empty(tokens, 128, dtype=dtype))
    check_resources(compiled)
