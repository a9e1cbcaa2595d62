"""AsyncEngine: the EngineClient over one engine behind a ClientEndpoint, in another process or in this one.

    generate ─▶ encode (Tokenizer) ─▶ check (validation) ─▶ RequestState ─▶ Submit ──────────▶ engine
    reader   ◀─ Mailbox ◀─ Delta ◀─ SampleOutput (text, stop strings) ◀─ RequestState ◀─ TokenDelta

Engines come and go. Whoever starts them (a supervisor, or nobody for an engine in this process) calls `engine_ready` with a connected
endpoint, `engine_lost` when the engine died and another will come, `engine_gone` when none will. Requests survive in between: see
`recovery`.

What does not belong here: how text is made (output_processor), what a request must satisfy (validation), messages and signs of life
(engine_link), processes (cluster).
"""

from __future__ import annotations

import asyncio
import contextlib
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
)
from penstock.core.transport import ClientEndpoint
from penstock.core.types import (
    PING_INTERVAL_S,
    Abort,
    Connect,
    EngineStats,
    Hello,
    LiveLimits,
    ModelInfo,
    StartupFailed,
    TokenDelta,
)
from penstock.serving.frontend.client import ChatPrompt, Delta, GenerationRequest, Health, Prompt, TokensPrompt
from penstock.serving.frontend.engine_link import PAUSE_LIMIT_S, EngineLink, LinkEvents
from penstock.serving.frontend.prompts import PromptEncoder
from penstock.serving.frontend.recovery import MAX_CRASHES, ReplayQueue, crashed_too_often
from penstock.serving.frontend.request_state import RequestState
from penstock.serving.frontend.tokenizer import Tokenizer
from penstock.serving.frontend.validation import check_prompt, check_token_ids, complete_sampling

logger = logging.getLogger(__name__)


class AsyncEngine:
    """See EngineClient for what each method promises.

    `tokenizer` None: only token-id prompts, no text. `hang_timeout_s`: an engine without progress for so long is reported to `on_hang`
    once, which has to end it (the supervisor's `kill`); without `on_hang` the engine counts as gone. `restart_wait_s`: how long a new
    request waits for an engine that starts; `max_parked`: how many may wait so. `pause_limit_s`: after this process stood still for so
    long, what runs is submitted again.

    `on_configured` is called with the limits that an engine's successor will get, whenever they change.

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
        pause_limit_s: float = PAUSE_LIMIT_S,
        on_hang: Callable[[str], None] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.on_hang = on_hang
        self.on_configured: Callable[[LiveLimits], None] | None = None
        self.hello: Hello | None = None
        self.engine_starts = 0
        self.finished_requests = 0
        self._hang_timeout_s = hang_timeout_s
        self._restart_wait_s = restart_wait_s
        self._max_parked = max_parked
        self._ping_interval_s = ping_interval_s
        self._pause_limit_s = pause_limit_s
        self._prompts = PromptEncoder(tokenizer)
        self._requests: dict[str, RequestState] = {}
        self._starting: set[str] = set()
        self._aborted_early: set[str] = set()
        self._replay = ReplayQueue()
        self._link: EngineLink | None = None
        self._connected = asyncio.Event()
        self._gone: str | None = None
        self._down_reason = "the engine is starting"
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._parked = 0
        self._limits = LiveLimits()
        self._last_stats: EngineStats | None = None

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
        if self.tokenizer is not None:
            model = msgspec.structs.replace(
                hello.model,
                tokenizer_hash=self.tokenizer.tokenizer_hash,
                template_hash=self.tokenizer.template_hash,
            )
            hello = msgspec.structs.replace(hello, model=model)
        self.hello = hello
        self.engine_starts += 1
        self._gone = None
        self._link = EngineLink(
            endpoint,
            LinkEvents(tokens=self._handle_delta, hang=self._report_hang, paused=self._submit_again, busy=self._busy),
            ping_interval_s=self._ping_interval_s,
            hang_timeout_s=self._hang_timeout_s,
            pause_limit_s=self._pause_limit_s,
        )
        if self._limits != LiveLimits():
            self._link.restore_limits(self._limits)
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

    def _detach(self) -> list[asyncio.Task[None]]:
        """Forget the engine of now, if any. Returns the tasks that end with it."""
        self._connected.clear()
        link, self._link = self._link, None
        if link is None:
            return []
        self._last_stats = link.stats or self._last_stats
        return link.close()

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
        if self._link is None:
            raise EngineDeadError(f"The engine is not ready: {self._gone or self._down_reason}.")
        in_force = await self._link.configure(limits)
        wanted = {name: value for name, value in msgspec.structs.asdict(limits).items() if value is not None}
        self._limits = msgspec.structs.replace(self._limits, **wanted)
        if wanted and self.on_configured is not None:
            self.on_configured(self._limits)
        return in_force

    def remember_limits(self, limits: LiveLimits) -> None:
        """Limits that another client of the same engine has set: its successor gets them from us too."""
        self._limits = limits

    async def stats(self) -> EngineStats | None:
        current = None if self._link is None else self._link.stats
        return current or self._last_stats

    def health(self) -> Health:
        """`details`: "requests" in flight, "restarts" of the engine so far, "seconds_without_progress" of the engine of now."""
        link = self._link
        reason = ""
        if self._gone is not None:
            reason = self._gone
        elif link is None:
            reason = self._down_reason
        elif link.hung:
            reason = "the engine makes no progress"
        elif self._draining:
            reason = "the server is shutting down"
        details = {
            "requests": len(self._requests),
            "restarts": max(0, self.engine_starts - 1),
            "seconds_without_progress": 0.0 if link is None else round(link.silent_s, 1),
        }
        return Health(live=True, ready=not reason, reason=reason, details=details)

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
        tasks = self._detach()
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
            param = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
            check_prompt(token_ids, model.vocab_size, param)
            sampling = complete_sampling(
                request.sampling,
                len(token_ids),
                model,
                has_tokenizer=self.tokenizer is not None,
                prompt_param=param,
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
        while self._link is None:
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
        if self._link is None or state.mailbox.closed:
            return
        first = not self._busy()
        submission = state.next_submission(asyncio.get_running_loop().time())
        try:
            self._link.submit(submission, first=first)
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
        if self._link is not None and state.in_engine and not state.finished:
            self._link.abort(Abort([state.request_id]))
        state.close(None if state.finished else error)
        self._submit_all(self._replay.settled(state.request_id))
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._requests and not self._starting:
            self._idle.set()

    # ---- news from the engine ----

    def _handle_delta(self, delta: TokenDelta) -> None:
        state = self._requests.get(delta.request_id)
        if state is None or delta.attempt != state.attempt or not state.in_engine:
            return
        proven = state.started
        try:
            if state.accept(delta) and self._link is not None:
                self._link.abort(Abort([state.request_id], [delta.index]))
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

    def _submit_again(self) -> None:
        """The engine may have taken this process for dead and dropped its requests; a second attempt does no harm."""
        states = [state for state in self._requests.values() if state.in_engine]
        if states and self._link is not None:
            logger.warning("this process stood still for a while; submitting %d requests again", len(states))
            self._link.abort(Abort([state.request_id for state in states]))
            self._submit_all(states)

    def _report_hang(self, reason: str) -> None:
        if self.on_hang is not None:
            self.on_hang(reason)
        else:
            self.engine_gone(reason)

    def _busy(self) -> bool:
        return any(state.in_engine for state in self._requests.values())

    def _vocab_size(self) -> int:
        sizes = [self.hello.model.vocab_size if self.hello else 0]
        sizes.append(self.tokenizer.vocab_size if self.tokenizer else 0)
        return max(sizes)
