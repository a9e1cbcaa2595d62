"""Calibration text that a model writes itself, for when there is no text like its use at hand.

A model's own samples at temperature 1 come close to the distribution that it was trained on, so its activations on them are typical
(Williams et al., 2024, "self-calibration", arXiv:2410.17170). Half begin with nothing; where the model has a chat template, half answer
a request.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from penstock.core.errors import ConfigError

_STORY = "Write a single paragraph moral story for children about a {} who learns the value of {} in a {}."
_REQUESTS = (
    "Explain in a few sentences how a bicycle stays upright.",
    "Write a short letter to a friend who has moved to another town.",
    "What should I think about before I adopt a dog?",
    "Write a Python function that merges two sorted lists.",
    "Summarise the causes of the First World War.",
    "Give me a recipe for vegetable soup.",
    *(
        _STORY.format(*parts)
        for parts in product(("fox", "rabbit", "bear"), ("honesty", "patience"), ("forest", "village"))
    ),
)

# The longest sample. Short ones are cheaper, and the first tokens of a text are the hardest to predict.
_SAMPLE_TOKENS = 256


def write_samples(folder: Path, num_tokens: int, *, threads: int = 0, progress: bool = False) -> list[list[int]]:
    """Token ids of samples of the model in `folder`, about `num_tokens` in all, prompts included; the same ones every time.

    Raises ConfigError for a model that has neither a BOS token nor a chat template, so that it has nothing to begin with.
    """
    from penstock.core.types import SamplingParams
    from penstock.llm import LLM

    with LLM(str(folder), threads=threads) as llm:
        tokenizer = llm.tokenizer
        if tokenizer is None:
            raise ConfigError(f"{folder} has no tokenizer.json; add it to the model folder.")
        prompts = [] if tokenizer.bos_token_id is None else [[tokenizer.bos_token_id]]
        if tokenizer.chat_template is not None:
            chats = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in _REQUESTS]
            prompts = [prompt for chat in chats for prompt in (*prompts[:1], chat)] if prompts else chats
        if not prompts:
            raise ConfigError(
                "This model has neither a BOS token nor a chat template to begin with; give --calibration FILE."
            )
        length = min(_SAMPLE_TOKENS, llm.model_info.max_request_tokens // 2)
        samples: list[list[int]] = []
        missing = num_tokens
        while missing > 0:
            batch = [prompts[(len(samples) + i) % len(prompts)] for i in range(max(8, missing // (2 * length)))]
            sampling = [
                SamplingParams(temperature=1.0, max_tokens=length, min_tokens=min(16, length), seed=len(samples) + i)
                for i in range(len(batch))
            ]
            for prompt, result in zip(batch, llm.generate(batch, sampling, progress=progress), strict=True):
                if result.error is not None:
                    raise result.error
                samples.append([*prompt, *result.outputs[0].token_ids])
                missing -= len(samples[-1])
        return samples
