"""Compiles every Triton kernel for a GPU that is not here: `python -m tests.execution.kernels.triton.compile_all 90 [--everything]`.

Without the flag each kernel is compiled with the tiles that have the least to spare; with it in all variants that launchers choose.
"""

from __future__ import annotations

import sys

from tests.execution.kernels.triton import (
    compile_attention,
    compile_block_moves,
    compile_cache_write,
    compile_linear,
    compile_moe,
    compile_rows,
    compile_sampling,
    compile_step_inputs,
)


def main(capability: int, *, everything: bool) -> None:
    for small in (compile_block_moves, compile_cache_write, compile_rows, compile_step_inputs):
        small.compile_kernels(capability)
    for large in (compile_attention, compile_linear, compile_moe, compile_sampling):
        large.compile_kernels(capability, everything=everything)


if __name__ == "__main__":
    main(int(sys.argv[1]), everything="--everything" in sys.argv)
