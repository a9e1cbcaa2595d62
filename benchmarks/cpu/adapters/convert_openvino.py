"""convert_openvino.py SOURCE TARGET KIND: a Hugging Face folder to OpenVINO IR with optimum-intel.

Kinds: bf16; int8 (asymmetric, one scale per channel) and int4 (asymmetric, group 128, all layers), the defaults of `optimum-cli export
openvino --weight-format`; with both, embeddings and head are int8.
"""

from __future__ import annotations

import sys

import torch
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

SCHEMES = {
    "bf16": None,
    "int8": OVWeightQuantizationConfig(bits=8, sym=False),
    "int4": OVWeightQuantizationConfig(bits=4, sym=False, group_size=128, ratio=1.0),
}


def main() -> None:
    source, target, kind = sys.argv[1:4]
    scheme = SCHEMES[kind]
    load = {"load_in_8bit": False} if scheme is None else {"quantization_config": scheme}
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, dtype=torch.bfloat16, **load)
    model.save_pretrained(target)


if __name__ == "__main__":
    main()
