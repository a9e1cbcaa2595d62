"""Compiles the kernels of quantised linear layers for GPUs that are not here; see testing/triton_compile.py."""

from __future__ import annotations

import torch

from penstock.execution.kernels.quantized import CodebookTensor, Float8Tensor, QuantizedTensor
from penstock.execution.kernels.triton import fp8, linear, linear_pack
from penstock.testing.triton_compile import check_resources, compile_only

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16)


def integers(rows: int, columns: int, bits: int, group: int, *, offsets: bool = False) -> linear_pack.GPUWeight:
    parameters = torch.zeros(rows, columns // group)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    return linear_pack.pack(QuantizedTensor(codes, bits, group, parameters, parameters if offsets else None), CPU)


def weights() -> dict[str, linear_pack.GPUWeight]:
    """One weight of each form and kind of scales, in shapes of models of 1 to 8 billion parameters."""
    codes = torch.zeros(2560, 2048, dtype=torch.uint8)
    float8 = codes.view(torch.float8_e4m3fn)
    return {
        "int4": integers(2560, 2048, 4, 128),
        "int4 offsets": integers(2048, 5632, 4, 32, offsets=True),
        "int4 rows": integers(1024, 14336, 4, 14336),
        "int8": integers(2560, 2048, 8, 2048),
        "int8 offsets": integers(1024, 4096, 8, 128, offsets=True),
        "codebook": linear_pack.pack(CodebookTensor(codes, torch.zeros(16), 64, torch.zeros(2560, 32)), CPU),
        "float8": linear_pack.pack(Float8Tensor(float8, (1, 2048), torch.zeros(2560, 1)), CPU),
        "float8 blocks": linear_pack.pack(Float8Tensor(float8, (128, 128), torch.zeros(20, 16)), CPU),
    }


# Numbers of tokens, one for each tile; every tile that a card has is compiled with the forms that need the most registers.
TOKENS = {
    80: {"int4": (1, 8, 24), "int8 offsets": (1, 64), "codebook": (1, 64), "float8": (1, 8), "float8 blocks": (64,)},
    90: {
        "int4": (1, 8, 24, 64, 200),
        "int4 offsets": (1, 8),
        "int4 rows": (8, 200),
        "int8": (1, 8, 200),
        "int8 offsets": (1, 200),
        "codebook": (1, 8, 200),
        "float8": (1, 8),
        "float8 blocks": (1, 24, 200),
    },
}

# Each form once, and the tiles that have the fewest registers to spare.
SOME_TOKENS = {
    80: {"int4": (1, 24), "int8 offsets": (64,), "codebook": (1,), "float8 blocks": (64,)},
    90: {"int4": (1, 200), "int8 offsets": (200,), "codebook": (200,), "float8": (1,), "float8 blocks": (200,)},
}


def compile_kernels(capability: int, *, everything: bool) -> None:
    all_weights = weights()
    with compile_only(capability) as compiled:
        for number, (name, batches) in enumerate((TOKENS if everything else SOME_TOKENS)[capability].items()):
            weight = all_weights[name]
            kernel = linear.TritonLinear(weight, torch.zeros(weight.out_features))
            for tokens in batches:
                kernel(torch.empty(tokens, weight.in_features, dtype=DTYPES[number % 2]))
            if name in {"int4", "int4 offsets", "float8"}:
                kernel.dequantize_rows(torch.zeros(5, dtype=torch.int64), torch.bfloat16)
        # A K that is no multiple of the span, and float32 activations.
        kernel = linear.TritonLinear(integers(1000, 1000, 8, 1000), None)
        kernel(torch.empty(3, 1000, dtype=torch.bfloat16))
        if everything:
            kernel(torch.empty(64, 1000, dtype=torch.float32))
        if capability == 90:
            fp8.quantize_tokens(torch.empty(3, 14336, dtype=torch.bfloat16))
            fp8.quantize_tokens(torch.empty(3, 2048, dtype=torch.float16), 0.5)
    check_resources(compiled)
