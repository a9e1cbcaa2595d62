"""transformers' own `generate` on a static batch, which is all that it has for prompts of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import protocol
import torch
import transformers


class Transformers:
    """settings: `model` (folder), `dtype`, `threads`."""

    notes = "static batch"

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=getattr(torch, settings["dtype"])
        ).eval()
        self._model.generation_config.eos_token_id = None
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def prepare(self, requests: int, tokens: int) -> None:
        """Nothing: the cache grows with the text."""

    def generate(self, prompts: Sequence[list[int]], output_tokens: int) -> list[int]:
        inputs = torch.tensor(prompts)
        with torch.inference_mode():
            outputs = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                pad_token_id=0,
            )
        return [outputs.shape[1] - inputs.shape[1]] * len(prompts)


if __name__ == "__main__":
    protocol.serve(Transformers)
