"""An engine without a model, for tests of everything that talks to an engine: the real messages, deterministic tokens, faults on demand.

A sample's next token is a pure function of prompt, output so far, seed and sample index (`next_token`), so a test can compute the
expected output and compare a stream that survived a crash with it.

As a child process:  python -m penstock.testing.fake_engine_process --options JSON --address ipc://… --parent-pid N
In a thread:         with fake_engine_thread(endpoint, FakeEngineOptions()) as engine: …
"""

from __future__ import annotations

import argparse
import os
import threading
import time
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from penstock.core.errors import InvalidRequestError
from penstock.core.process import exit_when_parent_dies
from penstock.core.transport import ClientId, EngineEndpoint, ZmqEngineEndpoint
from penstock.core.types import (
    STATUS_INTERVAL_S,
    Abort,
    Configure,
    Configured,
    Connect,
    Deltas,
    Disconnect,
    Drain,
    EngineRequest,
    EngineStats,
    FinishReason,
    FromEngine,
    Hello,
    LiveLimits,
    ModelInfo,
    Ping,
    StartupFailed,
    Status,
    Submit,
    ToEngine,
    TokenDelta,
    TokenLogprobs,
)

_CRASH_EXIT_STATUS = 9


class FakeEngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine behaves.

    Tokens come from [`low_token`, `low_token` + `num_tokens`). A step takes `step_s` seconds and gives every running sample
    `tokens_per_step` tokens; the first `prefill_steps` steps of a request give none. A request whose prompt holds `poison_token` ends the
    process after `fault_after` output tokens (0: in its first step); one with `hang_token` stops all progress there, and the engine then
    still answers Ping unless `hang_silently`. `startup_failure` is reported instead of Hello.
    """

    vocab_size: int = 300
    low_token: int = 0
    num_tokens: int = 256
    eos_token_id: int = 299
    step_s: float = 0.0
    tokens_per_step: int = 1
    prefill_steps: int = 0
    startup_s: float = 0.0
    startup_failure: str | None = None
    poison_token: int | None = None
    hang_token: int | None = None
    hang_silently: bool = False
    fault_after: int = 0
    max_num_seqs: int = 64
    max_model_len: int = 1000
    kv_cache_tokens: int = 2000
    model_hash: str = "fake"


def next_token(options: FakeEngineOptions, prompt: list[int], output: list[int], seed: int, index: int) -> int:
    """The one token that follows."""
    content = array("q", [seed, index, *prompt, *output]).tobytes()
    return options.low_token + zlib.crc32(content) % options.num_tokens


def expected_output(options: FakeEngineOptions, prompt: list[int], length: int, seed: int, index: int = 0) -> list[int]:
    """The first `length` tokens of a sample."""
    output: list[int] = []
    for _ in range(length):
        output.append(next_token(options, prompt, output, seed, index))
    return output


@dataclass(slots=True)
class _Sample:
    client: ClientId
    request: EngineRequest
    index: int
    output: list[int]
    prefill_left: int
    sent_first: bool = False


@dataclass(slots=True)
class _News:
    """Deltas per client, made in one step."""

    by_client: dict[ClientId, list[TokenDelta]] = field(default_factory=dict)

    def add(self, client: ClientId, delta: TokenDelta) -> None:
        self.by_client.setdefault(client, []).append(delta)


class FakeEngine:
    """Serves an EngineEndpoint from one thread until `stop`, Drain or a fault."""

    def __init__(self, endpoint: EngineEndpoint, options: FakeEngineOptions) -> None:
        self.options = options
        self.stop = threading.Event()
        self.received: list[ToEngine] = []
        self._endpoint = endpoint
        self._samples: list[_Sample] = []
        self._clients: set[ClientId] = set()
        self._limits = LiveLimits(max_num_seqs=options.max_num_seqs, max_num_batched_tokens=512)
        self._steps = 0
        self._hung = False
        self._draining = False
        self._started = time.monotonic()
        self._last_status = 0.0

    def serve(self) -> None:
        """The loop."""
        while not self.stop.is_set() and not (self._draining and not self._samples):
            idle = not self._samples or self._hung
            for client, message in self._endpoint.receive(0.01 if idle else 0.0):
                self._handle(client, message)
            if self._samples and not self._hung:
                time.sleep(self.options.step_s)
                self._step()
                if time.monotonic() - self._last_status > STATUS_INTERVAL_S / 10:
                    self._send_status()

    def _handle(self, client: ClientId, message: ToEngine) -> None:
        if self._hung and self.options.hang_silently:
            return
        self.received.append(message)
        match message:
            case Connect():
                self._clients.add(client)
                self._reply(client, self._hello())
            case Submit(request):
                self._submit(client, request)
            case Abort(request_ids, indices):
                self._abort(client, set(request_ids), indices)
            case Configure(call_id, limits):
                self._reply(client, self._configure(call_id, limits))
            case Ping():
                self._reply(client, Status(self.stats()))
            case Drain():
                self._draining = True
            case Disconnect():
                self._clients.discard(client)
                self._samples = [sample for sample in self._samples if sample.client != client]

    def _reply(self, client: ClientId, message: FromEngine) -> None:
        self._endpoint.send(client, message)

    def _hello(self) -> FromEngine:
        if self.options.startup_failure is not None:
            return StartupFailed(self.options.startup_failure)
        options = self.options
        model = ModelInfo(
            architecture="fake",
            dtype="float32",
            device="cpu",
            vocab_size=options.vocab_size,
            max_model_len=options.max_model_len,
            eos_token_ids=(options.eos_token_id,),
            num_parameters=0,
            weight_bytes=0,
            model_hash=options.model_hash,
            block_size=16,
            kv_cache_tokens=options.kv_cache_tokens,
            max_num_seqs=options.max_num_seqs,
        )
        return Hello(model, [("load", options.startup_s)])

    def _submit(self, client: ClientId, request: EngineRequest) -> None:
        for start in request.samples:
            sample = _Sample(client, request, start.index, list(start.output_token_ids), self.options.prefill_steps)
            self._samples.append(sample)
            if request.sampling.max_tokens == 0:
                self._samples.remove(sample)
                self._reply(client, Deltas([self._delta(sample, 0, [], "length")]))

    def _abort(self, client: ClientId, request_ids: set[str], indices: list[int] | None) -> None:
        news = _News()
        for sample in list(self._samples):
            if sample.request.request_id in request_ids and (indices is None or sample.index in indices):
                self._samples.remove(sample)
                news.add(client, self._delta(sample, len(sample.output), [], "abort"))
        self._send(news)

    def _configure(self, call_id: int, limits: LiveLimits) -> Configured:
        wanted = limits.max_num_seqs
        if wanted is not None and wanted > self.options.max_num_seqs:
            error = InvalidRequestError(
                f"max_num_seqs cannot exceed {self.options.max_num_seqs}.", param="max_num_seqs"
            )
            return Configured(call_id, self._limits, error.info)
        changes = {name: value for name, value in msgspec.structs.asdict(limits).items() if value is not None}
        self._limits = msgspec.structs.replace(self._limits, **changes)
        return Configured(call_id, self._limits)

    def _step(self) -> None:
        news = _News()
        for sample in self._samples[: self._limits.max_num_seqs]:
            self._fault(sample)
            if self._hung:
                break
            if sample.prefill_left:
                sample.prefill_left -= 1
                continue
            offset, tokens, finish = len(sample.output), [], None
            for _ in range(self.options.tokens_per_step):
                seed = sample.request.sampling.seed or 0
                token = next_token(self.options, sample.request.prompt_token_ids, sample.output, seed, sample.index)
                sample.output.append(token)
                tokens.append(token)
                finish = self._finish_reason(sample, token)
                if finish is not None:
                    self._samples.remove(sample)
                    break
            news.add(sample.client, self._delta(sample, offset, tokens, finish))
        if not self._hung:
            self._steps += 1
        self._send(news)

    def _fault(self, sample: _Sample) -> None:
        prompt = sample.request.prompt_token_ids
        if len(sample.output) < self.options.fault_after:
            return
        if self.options.poison_token is not None and self.options.poison_token in prompt:
            os._exit(_CRASH_EXIT_STATUS)
        if self.options.hang_token is not None and self.options.hang_token in prompt:
            self._hung = True

    def _finish_reason(self, sample: _Sample, token: int) -> FinishReason | None:
        sampling = sample.request.sampling
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {self.options.eos_token_id})
        if token in stops and len(sample.output) >= sampling.min_tokens:
            return "stop"
        return "length" if len(sample.output) >= (sampling.max_tokens or 0) else None

    def _delta(self, sample: _Sample, offset: int, tokens: list[int], finish: FinishReason | None) -> TokenDelta:
        sampling, prompt = sample.request.sampling, sample.request.prompt_token_ids
        first, sample.sent_first = not sample.sent_first, True
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        if first and sample.index == 0 and sampling.prompt_logprobs is not None:
            prompt_logprobs = [None, *(TokenLogprobs(token, -2.0, 1, [(token, -2.0)]) for token in prompt[1:])]
        return TokenDelta(
            request_id=sample.request.request_id,
            attempt=sample.request.attempt,
            index=sample.index,
            offset=offset,
            token_ids=tokens,
            logprobs=None
            if sampling.logprobs is None
            else [TokenLogprobs(token, -1.0, 1, [(token, -1.0)][: sampling.logprobs]) for token in tokens],
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            stop_token_id=tokens[-1] if finish == "stop" else None,
        )

    def _send(self, news: _News) -> None:
        for client, deltas in news.by_client.items():
            self._reply(client, Deltas(deltas))

    def stats(self) -> EngineStats:
        """Counts of now."""
        running = min(len(self._samples), self.options.max_num_seqs)
        return EngineStats(
            uptime_s=time.monotonic() - self._started,
            steps=self._steps,
            running=running,
            waiting=len(self._samples) - running,
            kv_blocks_total=100,
            kv_blocks_used=running,
            kv_blocks_cached=0,
            limits=self._limits,
        )

    def _send_status(self) -> None:
        self._last_status = time.monotonic()
        for client in self._clients:
            self._reply(client, Status(self.stats()))


@contextmanager
def fake_engine_thread(endpoint: EngineEndpoint, options: FakeEngineOptions) -> Iterator[FakeEngine]:
    """Serve `endpoint` in a thread for the length of the block."""
    engine = FakeEngine(endpoint, options)
    thread = threading.Thread(target=engine.serve, name="fake-engine", daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        engine.stop.set()
        thread.join(timeout=10)


def main() -> None:
    """The child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--options", default="{}")
    parser.add_argument("--address", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    exit_when_parent_dies(arguments.parent_pid)
    options = msgspec.json.decode(arguments.options, type=FakeEngineOptions)
    time.sleep(options.startup_s)
    endpoint = ZmqEngineEndpoint(arguments.address)
    FakeEngine(endpoint, options).serve()
    endpoint.close()


if __name__ == "__main__":
    main()
