"""A model runner driven by hand, and what the model says when each request runs alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.core.types import SamplingParams
from penstock.engine.step import CachedRequest, NewRequest, RunnerOutput, SchedulerOutput
from penstock.execution.attention.backend import KVCache
from penstock.execution.models.registry import LoadedModel
from penstock.execution.runner.batch import PersistentBatch
from penstock.execution.runner.model_runner import ModelRunner
from penstock.execution.sampling.sampler import Sampler
from penstock.execution.speculative.proposer import Proposer
from penstock.testing.paged_model import PagedModel

CPU = torch.device("cpu")
BLOCK_SIZE = 4
MAX_MODEL_LEN = 128
GREEDY = SamplingParams(temperature=0.0)


class Runner(Protocol):
    def execute(self, step: SchedulerOutput) -> RunnerOutput: ...


class WatchedModel:
    """The model, with a hook that sees the input ids and the hidden states of every step and may change the latter or raise."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self.hook: Callable[[Tensor, Tensor], Tensor] = lambda input_ids, hidden: hidden

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.hook(input_ids, self._model(input_ids, positions))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._model.compute_logits(hidden)


class Harness:
    """A runner over `loaded` whose cache memory is NaN until it is written. `make_proposer` makes where its drafts come from."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int = 64,
        num_host_blocks: int = 8,
        max_slots: int = 8,
        make_proposer: Callable[[Harness], Proposer] | None = None,
    ) -> None:
        self.loaded = loaded
        self.model = WatchedModel(loaded)
        self.kv_caches = poisoned_caches(loaded, num_blocks)
        self.host_caches = poisoned_caches(loaded, num_host_blocks)
        self.max_slots = max_slots
        self.batch = PersistentBatch(max_slots, MAX_MODEL_LEN, BLOCK_SIZE, CPU)
        # A few rows of logits at a time.
        self.max_logits_bytes = 3 * loaded.config.vocab_size * 4
        self.sampler = self.make_sampler()
        self.proposer = None if make_proposer is None else make_proposer(self)
        self.runner = self.make_runner()
        self._next_step = 0

    def make_sampler(self) -> Any:
        return Sampler(self.loaded.config.vocab_size, self.max_slots, CPU, self.loaded.config.eos_token_ids)

    def make_runner(self) -> Runner:
        return ModelRunner(
            self.model,
            self.loaded.attention_backend,
            self.kv_caches,
            self.host_caches,
            batch=self.batch,
            sampler=self.sampler,
            device=CPU,
            max_logits_bytes=self.max_logits_bytes,
            proposer=self.proposer,
        )

    def step(
        self,
        scheduled: dict[str, int],
        *,
        new: Sequence[NewRequest] = (),
        cached: Sequence[CachedRequest] = (),
        **changes: object,
    ) -> RunnerOutput:
        """Run one step; `changes` are further fields of SchedulerOutput."""
        return self.runner.execute(self.make_step(scheduled, new=new, cached=cached, **changes))

    def make_step(
        self,
        scheduled: dict[str, int],
        *,
        new: Sequence[NewRequest] = (),
        cached: Sequence[CachedRequest] = (),
        **changes: object,
    ) -> SchedulerOutput:
        step = SchedulerOutput(
            self._next_step,
            new_requests=list(new),
            cached_requests=list(cached),
            num_scheduled_tokens=scheduled,
        )
        for name, value in changes.items():
            setattr(step, name, value)
        self._next_step += 1
        return step

    def decode(self, lengths: dict[str, int], steps: int) -> dict[str, list[int]]:
        """Run `steps` decodes of requests that have `lengths` tokens, the last of them not computed yet, in the blocks they have."""
        tokens: dict[str, list[int]] = {key: [] for key in lengths}
        for offset in range(steps):
            cached = [CachedRequest(key, [], length - 1 + offset) for key, length in lengths.items()]
            output = self.step(dict.fromkeys(lengths, 1), cached=cached)
            for key in lengths:
                tokens[key] += output.sampled_token_ids[key]
        return tokens


def poisoned_caches(loaded: LoadedModel, num_blocks: int) -> list[KVCache]:
    """KV caches of all layers, in small blocks of NaN."""
    spec = dataclasses.replace(loaded.cache_spec, block_size=BLOCK_SIZE)
    backend, layers = loaded.attention_backend, range(loaded.config.num_layers)
    caches = [backend.allocate_kv_cache(num_blocks, spec, CPU) for _ in layers]
    for cache in caches:
        cache.key.fill_(torch.nan)
        cache.value.fill_(torch.nan)
    return caches


def new_request(
    key: str,
    token_ids: Sequence[int],
    block_ids: Sequence[int],
    sampling: SamplingParams = GREEDY,
    *,
    num_prompt_tokens: int | None = None,
    num_computed_tokens: int = 0,
    seed: int = 0,
    prompt_logprobs_start: int = 0,
) -> NewRequest:
    return NewRequest(
        key=key,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        num_computed_tokens=num_computed_tokens,
        block_ids=list(block_ids),
        sampling=sampling,
        seed=seed,
        sample_index=0,
        prompt_logprobs_start=prompt_logprobs_start,
    )


def solo_logits(loaded: LoadedModel, token_ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of a sequence computed alone, in one piece."""
    return PagedModel(loaded, num_blocks=16).step({"solo": list(token_ids)})["solo"]


def solo_tokens(
    loaded: LoadedModel, prompt: Sequence[int], count: int, sampling: SamplingParams = GREEDY, seed: int = 0
) -> list[int]:
    """`count` tokens of a request that runs alone, every token computed from the whole sequence anew."""
    token_ids = list(prompt)
    for _ in range(count):
        sampler = Sampler(loaded.config.vocab_size, 1, CPU, loaded.config.eos_token_ids)
        output = np.array(token_ids[len(prompt) :], dtype=np.int32)
        sampler.add(0, sampling, seed=seed, sample_index=0, prompt=np.array(prompt, dtype=np.int32), output=output)
        logits = solo_logits(loaded, token_ids)[-1:]
        token_ids.append(int(sampler.sample(logits, np.array([0]), np.array([len(token_ids)])).token_ids[0]))
    return token_ids[len(prompt) :]
