"""AsyncEngine: the EngineClient over one engine behind a ClientEndpoint, in another process or in this one.

    generate ─▶ encode (Tokenizer) ─▶ check (validation) ─▶ RequestState ─▶ Submit ──────────▶ engine
    reader   ◀─ Mailbox ◀─ Delta ◀─ SampleOutput (text, stop strings) ◀─ RequestState ◀─ TokenDelta

Engines come and go. Whoever starts them (a supervisor, or nobody for an engine in this process) calls `engine_ready` with a connected
endpoint, `engine_lost` when the engine died and another will come, `engine_gone` when none will. Requests survive in between: see
`recovery`.

What does not belong here: how text is made (output_processor), what a request must satisfy (validation), processes (cluster).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from penstock.core.errors import (
    AbortedError,
    ConfigError,
    DeadlineExceededError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    error_from_info,
)
from penstock.core.transport import ClientEndpoint
from penstock.core.types import (
    PING_INTERVAL_S,
    Abort,
    Configure,
    Configured,
    Connect,
    Deltas,
    Disconnect,
    EngineStats,
    FromEngine,
    Hello,
    LiveLimits,
    ModelInfo,
    Ping,
    StartupFailed,
    Status,
    Submit,
    TokenDelta,
)
from penstock.serving.frontend.client import (
    ChatPrompt,
    Delta,
    GenerationRequest,
    Health,
    Prompt,
    TokensPrompt,
)
from penstock.serving.frontend.progress import ProgressWatch
from penstock.serving.frontend.prompts import PromptEncoder
from penstock.serving.frontend.recovery import MAX_CRASHES, ReplayQueue, crashed_too_often
from penstock.serving.frontend.request_state import RequestState
from penstock.serving.frontend.tokenizer import Tokenizer
from penstock.serving.frontend.validation import check_prompt, check_token_ids, complete_sampling

logger = logging.getLogger(__name__)

CONFIGURE_TIMEOUT_S = 30.0


class AsyncEngine:
    """See EngineClient for what each method promises.

    `tokenizer` None: only token-id prompts, no text. `hang_timeout_s`: an engine without progress for so long is reported to `on_hang`
    once, which has to end it (the supervisor's `kill`); without `on_hang` the engine counts as gone. `restart_wait_s`: how long a new
    request waits for an engine that starts; `max_parked`: how many may wait so.

    `hello` is the last engine's greeting (None before the first), `engine_starts` counts engines, `finished_requests` requests that
    ended well. Used from one event loop. Call `close` at the end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        hang_timeout_s: float = 60.0,
        restart_wait_s: float = 30.0,
        max_parked: int = 1024,
        ping_interval_s: float = PING_INTERVAL_S,
        on_hang: Callable[[str], None] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.on_hang = on_hang
        self.hello: Hello | None = None
        self.engine_starts = 0
        self.finished_requests = 0
        self._hang_timeout_s = hang_timeout_s
        self._restart_wait_s = restart_wait_s
        self._max_parked = max_parked
        self._ping_interval_s = ping_interval_s
        self._prompts = PromptEncoder(tokenizer)
        self._requests: dict[str, RequestState] = {}
        self._starting: set[str] = set()
        self._aborted_early: set[str] = set()
        self._replay = ReplayQueue()
        self._endpoint: ClientEndpoint | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._connected = asyncio.Event()
        self._gone: str | None = None
        self._down_reason = "the engine is starting"
        self._hung = False
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._parked = 0
        self._stats: EngineStats | None = None
        self._limits = LiveLimits()
        self._call_ids = itertools.count()
        self._calls: dict[int, asyncio.Future[LiveLimits]] = {}
        self._unsent_aborts: list[Abort] = []
        self._watch = ProgressWatch(tick_s=ping_interval_s, hang_timeout_s=hang_timeout_s)

    # ---- the engine comes and goes ----

    async def connect(self, endpoint: ClientEndpoint, *, timeout_s: float = 600.0) -> Hello:
        """Greet an engine that nobody supervises (one in this process) and use it. Raises ConfigError with the engine's reason when
        it cannot start, EngineDeadError when it does not answer in time."""
        endpoint.send(Connect())
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    match await endpoint.receive():
                        case Hello() as hello:
                            self.engine_ready(endpoint, hello)
                            return hello
                        case StartupFailed(message):
                            raise ConfigError(message)
        except TimeoutError as error:
            raise EngineDeadError(f"The engine did not answer within {timeout_s:g} s.") from error

    def engine_ready(self, endpoint: ClientEndpoint, hello: Hello) -> None:
        """Use this engine, which has answered Connect with `hello`, and continue what the last one left. Takes over `endpoint`."""
        self._detach()
        if self.hello is not None and hello.model.model_hash != self.hello.model.model_hash:
            error = EngineError("The model was changed while this request ran.", code="model_changed")
            for state in list(self._requests.values()):
                self._end(state, error)
        self.hello = hello
        self.engine_starts += 1
        self._endpoint = endpoint
        self._gone = None
        self._hung = False
        self._watch = ProgressWatch(tick_s=self._ping_interval_s, hang_timeout_s=self._hang_timeout_s)
        self._tasks = [asyncio.create_task(self._read(endpoint)), asyncio.create_task(self._tick())]
        if self._limits != LiveLimits():
            self._send(Configure(next(self._call_ids), self._limits))
        self._submit_all(self._replay.restart(self._requests.values()))
        self._connected.set()

    def engine_lost(self, reason: str) -> None:
        """The engine died; another will come. Requests stay, except those that were in too many crashes."""
        self._detach()
        self._down_reason = reason
        for state in list(self._requests.values()):
            if state.in_engine:
                state.in_engine = False
                state.crashes += 1
                if state.crashes >= MAX_CRASHES:
                    self._end(state, crashed_too_often())

    def engine_gone(self, reason: str) -> None:
        """No engine will come; everything ends with EngineDeadError, and so does what is asked from now on."""
        self._detach()
        self._gone = reason
        for state in list(self._requests.values()):
            self._end(state, EngineDeadError(f"The engine is not available: {reason}."))
        # Wake the parked ones; they find out that the engine is gone.
        self._connected.set()

    def _detach(self) -> None:
        """Forget the engine of now, if any."""
        self._connected.clear()
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        self._unsent_aborts = []
        for call in self._calls.values():
            if not call.done():
                call.set_exception(EngineDeadError("The engine stopped before it changed its limits."))
        self._calls = {}

    # ---- EngineClient ----

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        state = await self._start(request)
        try:
            while (delta := await state.mailbox.get()) is not None:
                yield delta
        finally:
            self._end(state, AbortedError("The request was aborted."))

    async def abort(self, request_id: str) -> None:
        if request_id in self._starting:
            self._aborted_early.add(request_id)
        state = self._requests.get(request_id)
        if state is not None:
            self._end(state, AbortedError("The request was aborted."))

    async def tokenize(self, prompt: Prompt) -> list[int]:
        token_ids = await self._prompts.encode(prompt)
        if isinstance(prompt, TokensPrompt):
            check_token_ids("prompt", token_ids, self._vocab_size())
        return token_ids

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            raise InvalidRequestError("This model has no tokenizer, so token ids have no text.", param="tokens")
        check_token_ids("tokens", token_ids, self._vocab_size())
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    async def model_info(self) -> ModelInfo:
        if self.hello is None:
            raise EngineDeadError(f"The engine is not ready: {self._gone or self._down_reason}.")
        return self.hello.model

    async def configure(self, limits: LiveLimits) -> LiveLimits:
        if self._endpoint is None:
            raise EngineDeadError(f"The engine is not ready: {self._gone or self._down_reason}.")
        call_id = next(self._call_ids)
        call: asyncio.Future[LiveLimits] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = call
        try:
            self._endpoint.send(Configure(call_id, limits))
            async with asyncio.timeout(CONFIGURE_TIMEOUT_S):
                in_force = await call
        except TimeoutError as error:
            raise EngineDeadError("The engine did not answer.") from error
        finally:
            self._calls.pop(call_id, None)
        wanted = {name: value for name, value in msgspec.structs.asdict(limits).items() if value is not None}
        self._limits = msgspec.structs.replace(self._limits, **wanted)
        return in_force

    async def stats(self) -> EngineStats | None:
        return self._stats

    def health(self) -> Health:
        details = {
            "requests": len(self._requests),
            "engine_starts": self.engine_starts,
            "seconds_without_progress": round(self._watch.silent_s, 1),
        }
        if self._gone is not None:
            return Health(live=True, ready=False, reason=self._gone, details=details)
        if self._endpoint is None:
            return Health(live=True, ready=False, reason=self._down_reason, details=details)
        if self._hung or self._watch.hung:
            return Health(live=True, ready=False, reason="the engine makes no progress", details=details)
        if self._draining:
            return Health(live=True, ready=False, reason="the server is shutting down", details=details)
        return Health(live=True, ready=True, details=details)

    async def drain(self, timeout_s: float) -> None:
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        self._aborted_early |= self._starting
        for state in list(self._requests.values()):
            self._end(state, AbortedError("The server is shutting down.", code="shutting_down"))

    async def close(self) -> None:
        """Leave the engine, end what still runs, and release what this object holds. Idempotent."""
        self._draining = True
        for state in list(self._requests.values()):
            self._end(state, AbortedError("The server is shutting down.", code="shutting_down"))
        tasks = self._tasks
        self._send(Disconnect())
        self.engine_gone("the server is shutting down")
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.tokenizer is not None:
            self.tokenizer.close()

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when an engine is connected. Raises EngineDeadError when none comes in time or ever."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError as error:
            raise EngineDeadError(f"The engine is not ready: {self._down_reason}. Retry shortly.") from error
        if self._gone is not None:
            raise EngineDeadError(f"The engine is not available: {self._gone}.")

    # ---- one request ----

    async def _start(self, request: GenerationRequest) -> RequestState:
        """Encode, wait for an engine if there is none at the moment, check, submit."""
        loop = asyncio.get_running_loop()
        deadline = None if request.timeout_s is None else loop.time() + request.timeout_s
        if self._draining:
            raise OverloadedError("The server is shutting down.", code="shutting_down")
        if request.request_id in self._starting or request.request_id in self._requests:
            raise EngineError(f"The id {request.request_id} is in use.")
        self._starting.add(request.request_id)
        self._idle.clear()
        try:
            token_ids = await self._prompts.encode(request.prompt)
            await self._wait_for_engine(deadline)
            if request.request_id in self._aborted_early:
                raise AbortedError("The request was aborted.")
            model = await self.model_info()
            check_prompt(
                token_ids, model.vocab_size, "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
            )
            sampling = complete_sampling(
                request.sampling, len(token_ids), model, has_tokenizer=self.tokenizer is not None
            )
            state = RequestState(request, token_ids, sampling, self.tokenizer, deadline)
            self._requests[request.request_id] = state
        finally:
            self._starting.discard(request.request_id)
            self._aborted_early.discard(request.request_id)
            self._note_idle()
        if deadline is not None:
            state.timer = loop.call_at(
                deadline, self._end, state, DeadlineExceededError("The request took longer than it may.")
            )
        self._submit(state)
        return state

    async def _wait_for_engine(self, deadline: float | None) -> None:
        while self._endpoint is None:
            if self._gone is not None:
                raise EngineDeadError(f"The engine is not available: {self._gone}.")
            if self._parked >= self._max_parked:
                raise OverloadedError("The engine is starting and too many requests wait for it already.")
            wait_s = self._restart_wait_s
            if deadline is not None:
                wait_s = min(wait_s, deadline - asyncio.get_running_loop().time())
            self._parked += 1
            try:
                await self.wait_ready(wait_s)
            finally:
                self._parked -= 1

    def _submit(self, state: RequestState) -> None:
        """Hand the request, or what is left of it, to the engine. A failure is the request's outcome."""
        if self._endpoint is None or state.mailbox.closed:
            return
        if not self._busy():
            self._watch.progressed()
        submission = state.next_submission(asyncio.get_running_loop().time())
        try:
            self._endpoint.send(Submit(submission))
        except OverloadedError as error:
            state.in_engine = False
            self._end(state, error)

    def _submit_all(self, states: Sequence[RequestState]) -> None:
        for state in states:
            self._submit(state)

    def _end(self, state: RequestState, error: RequestError | None = None) -> None:
        """Set the outcome, tell the engine if it still works on the request, and forget it. The first outcome counts."""
        if self._requests.get(state.request_id) is not state:
            return
        del self._requests[state.request_id]
        if state.in_engine and not state.finished:
            self._send_abort(Abort([state.request_id]))
        state.close(None if state.finished else error)
        self._submit_all(self._replay.settled(state.request_id))
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._requests and not self._starting:
            self._idle.set()

    # ---- news from the engine ----

    async def _read(self, endpoint: ClientEndpoint) -> None:
        while True:
            self._handle(await endpoint.receive())

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Deltas(deltas):
                if deltas:
                    self._watch.progressed()
                for delta in deltas:
                    self._handle_delta(delta)
            case Status(stats):
                self._stats = stats
                self._watch.status(stats, busy=self._busy())
            case Configured(call_id, limits, error):
                call = self._calls.pop(call_id, None)
                if call is not None and not call.done():
                    if error is None:
                        call.set_result(limits)
                    else:
                        call.set_exception(error_from_info(error))
            case Hello() | StartupFailed():
                logger.debug("ignored a late %s", type(message).__name__)

    def _handle_delta(self, delta: TokenDelta) -> None:
        state = self._requests.get(delta.request_id)
        if state is None or delta.attempt != state.attempt or not state.in_engine:
            return
        proven = state.started
        try:
            if state.accept(delta):
                self._send_abort(Abort([state.request_id], [delta.index]))
        except RequestError as error:
            self._end(state, error)
            return
        # A fault in handling one request's news must end that request and no other.
        except Exception:
            logger.exception("request %s: cannot handle the engine's news", state.request_id)
            self._end(state, EngineError("The server failed on this request."))
            return
        if state.finished:
            self.finished_requests += 1
            self._end(state)
        elif not proven:
            self._submit_all(self._replay.settled(state.request_id))

    # ---- housekeeping ----

    def _busy(self) -> bool:
        return any(state.in_engine for state in self._requests.values())

    def _vocab_size(self) -> int:
        sizes = [self.hello.model.vocab_size if self.hello else 0]
        sizes.append(self.tokenizer.vocab_size if self.tokenizer else 0)
        return max(sizes)

    def _send(self, message: Configure | Ping | Disconnect) -> None:
        """Send what may as well be lost when the queue is full."""
        if self._endpoint is not None:
            with contextlib.suppress(OverloadedError):
                self._endpoint.send(message)

    def _send_abort(self, abort: Abort) -> None:
        """Send, or keep for later when the queue is full, so that no request runs on for nobody."""
        if self._endpoint is None:
            return
        try:
            self._endpoint.send(abort)
        except OverloadedError:
            self._unsent_aborts.append(abort)

    async def _tick(self) -> None:
        """Say that we are alive, and notice when the engine is not."""
        loop = asyncio.get_running_loop()
        while True:
            self._send(Ping())
            aborts, self._unsent_aborts = self._unsent_aborts, []
            for abort in aborts:
                self._send_abort(abort)
            self._watch.tick(loop.time())
            if self._watch.hung and not self._hung:
                self._report_hang()
            await asyncio.sleep(self._ping_interval_s)

    def _report_hang(self) -> None:
        self._hung = True
        reason = f"the engine made no progress for {self._watch.silent_s:.0f} s"
        logger.error("%s", reason)
        if self.on_hang is not None:
            self.on_hang(reason)
        else:
            self.engine_gone(reason)
