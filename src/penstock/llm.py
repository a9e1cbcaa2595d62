"""Penstock as a library: `LLM` for offline batches, `AsyncLLM` for embedding an engine in another program.

from penstock import LLM, SamplingParams

llm = LLM("path/to/model")
for output in llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=32)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, Unpack

from tqdm import tqdm

from penstock.core.config import EMBEDDED_MODEL, DType, EngineConfig
from penstock.core.errors import InvalidRequestError, RequestError, error_from_info
from penstock.core.types import (
    EngineRequest,
    EngineStats,
    FinishReason,
    ModelInfo,
    SamplingParams,
    TokenDelta,
)

if TYPE_CHECKING:
    from penstock.engine.engine import Engine
    from penstock.engine.process import EngineLoop
    from penstock.serving.frontend.async_engine import AsyncEngine
    from penstock.serving.frontend.client import TokenLogprob
    from penstock.serving.frontend.output_processor import SampleOutput
    from penstock.serving.frontend.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class EngineSettings(TypedDict, total=False):
    """The fields of core.config.EngineConfig other than `model`, as keyword arguments."""

    revision: str | None
    load_format: str
    dtype: DType
    device: str
    quantization: str
    quantization_group_size: int
    weight_cache: bool
    kv_cache_dtype: str
    attention_backend: str
    enforce_eager: bool
    cuda_graph_max_batch_size: int
    overlap_scheduling: str
    threads: int
    cpus: str
    seed: int
    max_model_len: int
    block_size: int
    memory_utilization: float
    kv_cache_gib: float
    swap_space_gib: float
    prefix_caching: bool
    max_num_batched_tokens: int
    max_num_seqs: int
    max_prefill_tokens_while_decoding: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    worker_address: str
    local_ranks: int
    speculative_model: str
    num_speculative_tokens: int
    scheduling_policy: str
    max_waiting_requests: int


@dataclass(slots=True)
class CompletionOutput:
    """One sample. `logprobs` has one entry per token when they were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)
class RequestOutput:
    """One prompt's outcome. When it failed, `error` says why and the outputs are what there was until then."""

    prompt: str | list[int] | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None
    error: RequestError | None = None


@dataclass(slots=True)
class _Job:
    """A request on its way: what the engine is asked, what turns its tokens into text, and the result so far."""

    request: EngineRequest
    samples: list[SampleOutput]
    result: RequestOutput
    unfinished: int


class LLM:
    """An engine in this process, driven by the calling thread. Not thread-safe.

    `model` is a folder, the name of a pulled model, or "stories" (the embedded model). Raises ConfigError or ModelFormatError when it
    cannot be loaded. A context manager that calls `shutdown`.
    """

    def __init__(self, model: str = EMBEDDED_MODEL, **settings: Unpack[EngineSettings]) -> None:
        from penstock.hub import resolve_models
        from penstock.launch import build_engine
        from penstock.serving.frontend.tokenizer import Tokenizer

        folder, config = resolve_models(EngineConfig(model=model, **settings))
        self.tokenizer = Tokenizer.from_folder(folder)
        self._engine, self.timeline = build_engine(config, folder)
        self._max_queued = min(config.max_waiting_requests, 4 * self._engine.model.max_num_seqs)
        self._ids = itertools.count()

    @property
    def model_info(self) -> ModelInfo:
        return self._engine.model

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters."""
        return self._engine.stats()

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids); results in the order of the prompts.

        `sampling_params`: one for all, or one per prompt. A prompt that fails has `error` set and does not end the others.
        """
        results = [RequestOutput(prompt, [], []) for prompt in prompts]
        encoders = [partial(self._encode, prompt) for prompt in prompts]
        return self._run(results, encoders, sampling_params, progress=progress, chat=False)

    def chat(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer every conversation (messages with `role` and `content`) through the model's chat template."""
        results = [RequestOutput(None, [], []) for _ in conversations]
        encoders = [partial(self._require_tokenizer().encode_chat, messages) for messages in conversations]
        return self._run(results, encoders, sampling_params, progress=progress, chat=True)

    def shutdown(self) -> None:
        """Release the model and its memory. Idempotent."""
        self._engine.shutdown()
        if self.tokenizer is not None:
            self.tokenizer.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _encode(self, prompt: str | list[int]) -> list[int]:
        return self._require_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(
                "This model has no tokenizer; give prompts as lists of token ids.", param="prompt"
            )
        return self.tokenizer

    def _run(
        self,
        results: list[RequestOutput],
        encoders: Sequence[Callable[[], list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        progress: bool,
        chat: bool,
    ) -> list[RequestOutput]:
        """Feed the engine as it takes requests, step it, and gather what comes, until every result is complete."""
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(results)
        queue = deque(zip(results, encoders, sampling_params, strict=True))
        jobs: dict[str, _Job] = {}
        with tqdm(total=len(results), unit="prompt", disable=not progress, dynamic_ncols=True) as bar:
            while queue or jobs:
                while queue and len(jobs) < self._max_queued:
                    result, encode, sampling = queue.popleft()
                    job = self._start(result, encode, sampling, chat=chat)
                    if job is None:
                        bar.update()
                    else:
                        jobs[job.request.request_id] = job
                        self._take(self._engine.add(job.request), jobs, bar)
                self._take(self._engine.step(), jobs, bar)
        return results

    def _start(
        self, result: RequestOutput, encode: Callable[[], list[int]], sampling: SamplingParams, *, chat: bool
    ) -> _Job | None:
        """Encode and check; None when that failed, which is then the result."""
        from penstock.serving.frontend.output_processor import SampleOutput
        from penstock.serving.frontend.validation import check_prompt, complete_sampling

        model = self._engine.model
        try:
            prompt = encode()
            check_prompt(prompt, model.vocab_size, "prompt")
            complete = complete_sampling(sampling, len(prompt), model, has_tokenizer=self.tokenizer is not None)
        except RequestError as error:
            result.error = error
            return None
        result.prompt_token_ids = prompt
        result.outputs = [CompletionOutput(index) for index in range(complete.n)]
        request = EngineRequest(request_id=f"llm-{next(self._ids)}", prompt_token_ids=prompt, sampling=complete)
        samples = [SampleOutput(i, complete, self.tokenizer, at_text_start=chat) for i in range(complete.n)]
        return _Job(request, samples, result, complete.n)

    def _take(self, deltas: Sequence[tuple[bytes, TokenDelta]], jobs: dict[str, _Job], bar: tqdm[NoReturn]) -> None:
        for _, delta in deltas:
            job = jobs.get(delta.request_id)
            if job is None:
                continue
            if self._accept(job, delta):
                self._engine.abort(b"", delta.request_id, [delta.index])
            if not job.unfinished:
                del jobs[delta.request_id]
                bar.update()

    def _accept(self, job: _Job, delta: TokenDelta) -> bool:
        """Append a delta to the result. True when a stop string ended the sample, which the engine has to be told."""
        from penstock.serving.frontend.output_processor import spell_prompt_logprobs

        result, output = job.result, job.result.outputs[delta.index]
        if output.finish_reason is not None:
            return False
        if delta.error is not None:
            result.error = error_from_info(delta.error)
        if delta.prompt_logprobs is not None:
            result.prompt_logprobs = spell_prompt_logprobs(
                delta.prompt_logprobs, result.prompt_token_ids, self.tokenizer
            )
        result.num_cached_tokens = max(result.num_cached_tokens, delta.num_cached_tokens)
        news = job.samples[delta.index].add(delta.token_ids, delta.logprobs, delta.finish_reason, delta.stop_token_id)
        output.text += news.text
        output.token_ids += news.token_ids
        if news.logprobs is not None:
            output.logprobs = [*(output.logprobs or []), *news.logprobs]
        if news.finish_reason is not None:
            output.finish_reason, output.stop_reason = news.finish_reason, news.stop_reason
            job.unfinished -= 1
        return news.cut


class AsyncLLM:
    """An engine in a thread of this process, for embedding in an asyncio program.

        async with AsyncLLM(EngineConfig(model="path/to/model")) as engine:
            async for delta in engine.generate(request):
                ...

    What `async with` gives is an EngineClient (see serving/frontend/client.py), the same that the server uses. Raises ConfigError or
    ModelFormatError on entering when the model cannot be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._thread: threading.Thread | None = None
        self._loop: EngineLoop | None = None
        self._client: AsyncEngine | None = None

    async def __aenter__(self) -> AsyncEngine:
        from penstock.core.transport import InProcessTransport
        from penstock.engine.process import EngineLoop
        from penstock.hub import resolve_models
        from penstock.launch import build_engine
        from penstock.serving.frontend.async_engine import AsyncEngine
        from penstock.serving.frontend.tokenizer import Tokenizer

        folder, config = resolve_models(self._config)
        tokenizer = Tokenizer.from_folder(folder)
        engine, timeline = await asyncio.to_thread(build_engine, config, folder)
        transport = InProcessTransport()
        self._loop = EngineLoop(engine, transport.engine, timeline)
        self._client = AsyncEngine(tokenizer)
        events = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=self._serve, args=(self._loop, engine, events, self._client), name="penstock-engine", daemon=True
        )
        self._thread.start()
        await self._client.connect(transport.client)
        return self._client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()
        if self._loop is not None:
            self._loop.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    @staticmethod
    def _serve(loop: EngineLoop, engine: Engine, events: asyncio.AbstractEventLoop, client: AsyncEngine) -> None:
        try:
            loop.run()
        except Exception as error:
            logger.exception("the engine failed")
            events.call_soon_threadsafe(client.engine_gone, f"the engine failed ({type(error).__name__})")
        finally:
            engine.shutdown()
