from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.config import EngineConfig
from penstock.engine.step import BlockMove, CachedRequest, RunnerOutput, SchedulerOutput
from penstock.execution.models.registry import LoadedModel, load_model
from penstock.execution.parallel.groups import ModelPart, PipelineStage
from penstock.execution.runner import pipeline
from penstock.execution.runner.batch import PersistentBatch
from penstock.execution.runner.model_runner import ModelRunner
from penstock.execution.runner.pipeline import LaterStage, SettlingRunner, StageLink, StageRunner
from penstock.execution.sampling.sampler import Sampler
from tests.execution.runner.harness import BLOCK_SIZE, CPU, MAX_MODEL_LEN, new_request, solo_tokens

PROMPT = [5, 6, 7, 8, 9, 10]


class Sent:
    def __init__(self) -> None:
        self.waited = False

    def is_completed(self) -> bool:
        return False

    def wait(self) -> None:
        self.waited = True


class Wire:
    """torch.distributed between two stages of one process: what was sent lies here until it is received."""

    def __init__(self) -> None:
        self.messages: deque[Tensor] = deque()
        self.works: list[Sent] = []

    def isend(self, tensor: Tensor, dst: int) -> Sent:
        assert dst == 1
        self.messages.append(tensor.clone())
        self.works.append(Sent())
        return self.works[-1]

    def recv(self, tensor: Tensor, src: int) -> None:
        assert src == 0
        message = self.messages.popleft()
        assert message.shape == tensor.shape
        tensor.copy_(message)


class Broken:
    """A stage's model that fails when it is told to, before or after its layers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fails: str | None = None

    def __call__(self, input_ids: Tensor, positions: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.fails is not None:
            raise MemoryError(self.fails)
        result: Tensor = self.model(input_ids, positions, residual)
        return result

    def compute_logits(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.model.compute_logits(hidden)
        return result


class Pipeline:
    """Both stages of a model of two layers, step after step."""

    def __init__(self, checkpoint: Path, wire: Wire) -> None:
        self.wire = wire
        stages = [self._load(checkpoint, index) for index in range(2)]
        self.models = [Broken(loaded.model) for loaded in stages]
        batches = [PersistentBatch(4, MAX_MODEL_LEN, BLOCK_SIZE, CPU) for _ in range(2)]
        self.links = [
            StageLink(previous, after, hidden_size=64, dtype=torch.float32, device=CPU)
            for previous, after in ((None, 1), (0, None))
        ]
        backend = stages[0].attention_backend
        spec = stages[0].cache_spec
        caches = [[backend.allocate_kv_cache(16, spec, CPU)] for _ in range(2)]
        self.first = StageRunner(
            self.models[0], backend, caches[0], [], batch=batches[0], device=CPU, link=self.links[0]
        )
        runner = ModelRunner(
            LaterStage(self.models[1], self.links[1]),
            backend,
            caches[1],
            [],
            batch=batches[1],
            sampler=Sampler(272, 4, CPU, ()),
            device=CPU,
        )
        self.last = SettlingRunner(runner, self.links[1])

    @staticmethod
    def _load(checkpoint: Path, index: int) -> LoadedModel:
        config = EngineConfig(attention_backend="torch", block_size=BLOCK_SIZE)
        part = ModelPart(stage=PipelineStage(index, 2))
        return load_model(config, checkpoint, CPU, torch.float32, progress=False, part=part)

    def execute(self, step: SchedulerOutput) -> RunnerOutput:
        """The answer of the last stage; raises the first stage's error after the last one is done."""
        error: Exception | None = None
        try:
            assert self.first.execute(step).sampled_token_ids == {}
        except MemoryError as failure:
            error = failure
        output = self.last.execute(step)
        if error is not None:
            raise error
        self.first.learn(output.sampled_token_ids)
        return output


@pytest.fixture
def pipe(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    wire = Wire()
    monkeypatch.setattr(pipeline, "dist", wire)
    pipe = Pipeline(checkpoint, wire)
    yield pipe
    assert not wire.messages, "every message was taken"
    for link in pipe.links:
        link.close()
    # The oldest were waited for on the way, all others at the end.
    assert all(work.waited for work in wire.works)


def prefill(key: str = "a", blocks: tuple[int, ...] = (1, 2, 3, 4)) -> SchedulerOutput:
    return SchedulerOutput(0, new_requests=[new_request(key, PROMPT, blocks)], num_scheduled_tokens={key: len(PROMPT)})


def decode(key: str, computed: int) -> SchedulerOutput:
    return SchedulerOutput(0, cached_requests=[CachedRequest(key, [], computed)], num_scheduled_tokens={key: 1})


def test_two_stages_say_what_the_whole_model_says(pipe: Pipeline, loaded: LoadedModel) -> None:
    tokens = pipe.execute(prefill()).sampled_token_ids["a"]
    for computed in range(len(PROMPT), len(PROMPT) + 6):
        tokens += pipe.execute(decode("a", computed)).sampled_token_ids["a"]
    assert tokens == solo_tokens(loaded, PROMPT, 7)


def test_blocks_move_in_all_stages(pipe: Pipeline, loaded: LoadedModel) -> None:
    first = pipe.execute(prefill()).sampled_token_ids["a"]
    fork = SchedulerOutput(
        0,
        new_requests=[new_request("b", PROMPT, (1, 9), num_computed_tokens=len(PROMPT) - 1)],
        num_scheduled_tokens={"b": 1},
        block_copies=[BlockMove(2, 9)],
        finished_keys=["a"],
    )
    assert pipe.execute(fork).sampled_token_ids["b"] == first == solo_tokens(loaded, PROMPT, 1)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_that_fails_in_one_stage_leaves_no_message_behind(
    pipe: Pipeline, loaded: LoadedModel, stage: int
) -> None:
    pipe.execute(prefill())
    pipe.models[stage].fails = "no room"
    with pytest.raises(MemoryError, match="no room"):
        pipe.execute(prefill("b", (5, 6)))
    pipe.models[stage].fails = None
    again = prefill("b", (5, 6))
    again.preempted_keys = ["b"]
    assert pipe.execute(again).sampled_token_ids["b"] == solo_tokens(loaded, PROMPT, 1)
    assert pipe.execute(decode("a", len(PROMPT))).sampled_token_ids["a"] == solo_tokens(loaded, PROMPT, 2)[1:]


def test_tokens_of_requests_that_are_gone_are_nobodys(pipe: Pipeline, loaded: LoadedModel) -> None:
    pipe.execute(prefill())
    pipe.execute(SchedulerOutput(0, finished_keys=["a"]))
    pipe.first.learn({"a": [7], "unknown": [8]})
    assert pipe.execute(prefill()).sampled_token_ids["a"] == solo_tokens(loaded, PROMPT, 1)


def test_drafts_are_inputs_of_every_stage(pipe: Pipeline, loaded: LoadedModel) -> None:
    expected = solo_tokens(loaded, PROMPT, 6)
    assert pipe.execute(prefill()).sampled_token_ids["a"] == expected[:1]
    verify = SchedulerOutput(
        0,
        cached_requests=[CachedRequest("a", [], len(PROMPT))],
        num_scheduled_tokens={"a": 4},
        draft_token_ids={"a": [*expected[1:3], 271 if expected[3] != 271 else 0]},
    )
    assert pipe.execute(verify).sampled_token_ids["a"] == expected[1:4]
    assert pipe.execute(decode("a", len(PROMPT) + 3)).sampled_token_ids["a"] == expected[4:5]
