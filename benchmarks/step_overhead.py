"""What does the Python side of a step cost? Everything in a step that is not the model, by number of requests.

    python benchmarks/step_overhead.py

The engine's own loop serves the embedded model in this process: it schedules, prepares, launches, samples, and encodes each step's news
as it would for a client; only the socket is left out. Phases are those of the metric penstock_engine_step_phase_seconds_total; `loop` is
what no phase accounts for. The budget for all of them together, `forward` excluded, is 0.5 ms with 1 request and 2 ms with 64.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import msgspec

from common import Model, Options, Results, find_model, script_options
from penstock.core.config import EngineConfig
from penstock.core.transport import ClientId
from penstock.core.types import (
    Connect,
    Deltas,
    EngineRequest,
    FromEngine,
    LiveLimits,
    SamplingParams,
    Submit,
    ToEngine,
)
from penstock.engine.engine import Engine
from penstock.engine.process import EngineLoop
from penstock.hub import resolve_model
from penstock.telemetry.metrics import STEP_PHASES

BATCHES = (1, 8, 64)
BUDGET_MS = {1: 0.5, 64: 2.0}
PROMPT_TOKENS = 32
WARM_UP_STEPS = 20
CLIENT = b"client"
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
    "top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9, max_tokens=1, ignore_eos=True, seed=1),
}


class LoadedEndpoint:
    """Submits requests in one go, encodes what the engine sends, and stops the loop when the requests have decoded enough.

    Keeps the times at which steps were delivered and the phase sums at those times, from the first step after warm-up on.
    """

    def __init__(self, requests: list[EngineRequest], steps: int) -> None:
        self._inbox: list[ToEngine] = [Connect(), *(Submit(request) for request in requests)]
        self._batch = len(requests)
        self._steps = WARM_UP_STEPS + steps
        self._encoder = msgspec.msgpack.Encoder()
        self._done = 0
        self.engine: Engine | None = None
        self.loop: EngineLoop | None = None
        self.times: list[float] = []
        self.phases: list[dict[str, float]] = []

    def receive(self, timeout_s: float) -> list[tuple[ClientId, ToEngine]]:
        messages, self._inbox = [(CLIENT, message) for message in self._inbox], []
        return messages

    def send(self, client: ClientId, message: FromEngine) -> bool:
        self._encoder.encode(message)
        if isinstance(message, Deltas) and len(message.deltas) == self._batch:
            self._done += 1
            if self._done > WARM_UP_STEPS and self.engine is not None:
                self.times.append(time.perf_counter())
                self.phases.append(dict(self.engine.counters.phase_seconds))
            if self._done >= self._steps and self.loop is not None:
                self.loop.stop()
        return True

    def close(self) -> None:
        """Nothing to release."""


@script_options
def main(options: Options) -> None:
    """Milliseconds per step outside of the model, by phase."""
    results = Results("step_overhead", options)
    model = find_model("stories", options)
    rows = [["sampling", "requests", *(phase for phase in STEP_PHASES if phase != "forward"), "loop", "overhead ms"]]
    rows[0] += ["budget ms", "forward ms"]
    for name in SAMPLINGS:
        for batch in BATCHES:
            data = results.section(f"{name} n={batch}", partial(_measure, model, name, batch, options))
            rows.append(_row(name, batch, data))
    results.publish(
        rows, ["Medians over the steps, in milliseconds; short contexts, one new token per request and step."]
    )


def _row(name: str, batch: int, data: dict[str, float]) -> list[str]:
    overhead = data["overhead"]
    parts = [data[phase] for phase in (*STEP_PHASES, "loop") if phase != "forward"]
    return [
        name,
        str(batch),
        *(f"{part:.3f}" for part in parts),
        f"{overhead:.3f}",
        f"{BUDGET_MS[batch]:g}" if batch in BUDGET_MS else "–",
        f"{data['forward']:.3f}",
    ]


def _measure(model: Model, sampling: str, batch: int, options: Options) -> dict[str, Any]:
    from penstock.execution.runner.executors import UniProcessExecutor

    steps = 100 if options.quick else 300
    config = EngineConfig(
        **{**model.settings, "max_num_seqs": batch, "max_num_batched_tokens": max(512, batch * PROMPT_TOKENS)}
    )
    executor = UniProcessExecutor(config, resolve_model(config.model))
    limits = LiveLimits(
        max_num_batched_tokens=executor.config.max_num_batched_tokens,
        max_num_seqs=batch,
        max_prefill_tokens_while_decoding=executor.config.max_num_batched_tokens,
    )
    params = msgspec.structs.replace(SAMPLINGS[sampling], max_tokens=WARM_UP_STEPS + steps + 10)
    requests = [
        EngineRequest(
            request_id=f"request-{number}",
            attempt=0,
            prompt_token_ids=[3 + (7 * number + 31 * place) % 4000 for place in range(PROMPT_TOKENS)],
            sampling=params,
        )
        for number in range(batch)
    ]
    endpoint = LoadedEndpoint(requests, steps)
    endpoint.engine = Engine(executor, limits)
    endpoint.loop = EngineLoop(endpoint.engine, endpoint, [])
    try:
        endpoint.loop.run()
    finally:
        endpoint.engine.shutdown()
    return _medians(endpoint)


def _medians(endpoint: LoadedEndpoint) -> dict[str, float]:
    """Milliseconds per step, the median of each part; `loop`: the step's time that is in no phase."""
    walls = [later - earlier for earlier, later in zip(endpoint.times, endpoint.times[1:], strict=False)]
    parts = {
        phase: [
            later[phase] - earlier[phase] for earlier, later in zip(endpoint.phases, endpoint.phases[1:], strict=False)
        ]
        for phase in STEP_PHASES
    }
    parts["loop"] = [wall - sum(part[step] for part in parts.values()) for step, wall in enumerate(walls)]
    parts["overhead"] = [wall - forward for wall, forward in zip(walls, parts["forward"], strict=True)]
    return {name: 1000 * statistics.median(values) for name, values in parts.items()}


if __name__ == "__main__":
    main()
