"""The scheduler's view of one sample of one request."""

from __future__ import annotations

import enum

from penstock.core.types import EngineRequest, SampleStart, TokenLogprobs
from penstock.engine.grammar import Matcher
from penstock.engine.step import RequestKey


class RequestStatus(enum.Enum):
    WAITING = "waiting"  # in the policy's queue: new, or preempted
    FOLLOWING = "following"  # waits for its leader to compute the prompt that they share
    RUNNING = "running"  # owns KV blocks
    FINISHED = "finished"


class Request:
    """State of one sample. Mutated by the scheduler; `block_ids` and the hashes by the KV cache manager.

    token_ids   [ prompt … | output … ]                        known tokens
                  0 … num_prompt_tokens … num_tokens
    pending     num_pending tokens after them are being sampled by steps in flight and are not known yet.
    computed    num_computed_tokens of known and pending tokens have their KV computed, or will have when the steps in flight retire;
                num_retired_tokens of them are from steps that did retire.

    A request is scheduled until num_computed_tokens catches up with num_tokens + num_pending; the step that catches up samples.

    drafts      draft_token_ids are guesses at the tokens behind the last known one, for the next step that computes that one. A step that
                verifies drafts counts them as computed until it retires.

    `matcher`: what the output is restricted to, if it is; it has accepted the known output.

    charged     the first num_charged_tokens are on the tenant's account; what a preemption makes the engine compute again is not charged.

    `order`: position in arrival order, unique. `epoch` counts preemptions, so that news from before one is recognised.
    """

    __slots__ = (
        "arrival_time",
        "attempt",
        "block_hashes",
        "block_ids",
        "client",
        "deadline",
        "draft_token_ids",
        "epoch",
        "first_scheduled_time",
        "followers",
        "index",
        "key",
        "known_to_runner",
        "last_step_id",
        "leader",
        "matcher",
        "max_output_tokens",
        "num_cached_blocks",
        "num_cached_tokens",
        "num_charged_tokens",
        "num_computed_tokens",
        "num_inflight",
        "num_pending",
        "num_prompt_tokens",
        "num_retired_tokens",
        "order",
        "priority",
        "prompt_logprobs",
        "request_id",
        "root_hash",
        "sampling",
        "seed",
        "status",
        "stop_token_ids",
        "suspect",
        "tenant",
        "token_ids",
        "weight",
    )

    def __init__(
        self,
        source: EngineRequest,
        sample: SampleStart,
        *,
        client: bytes,
        order: int,
        now: float,
        eos_token_ids: tuple[int, ...],
        max_output_tokens: int,
        root_hash: bytes,
        matcher: Matcher | None = None,
    ) -> None:
        sampling = source.sampling
        self.key: RequestKey = f"{source.request_id}/{sample.index}"
        self.request_id = source.request_id
        self.attempt = source.attempt
        self.index = sample.index
        self.client = client
        self.order = order
        self.arrival_time = now
        self.deadline = None if source.timeout_s is None else now + source.timeout_s
        self.first_scheduled_time: float | None = None
        self.priority = source.priority
        self.tenant = source.tenant
        self.weight = source.weight

        self.sampling = sampling
        self.seed = sampling.seed or 0
        self.max_output_tokens = max_output_tokens
        self.stop_token_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else frozenset(eos_token_ids)
        )

        self.token_ids = [*source.prompt_token_ids, *sample.output_token_ids]
        self.num_prompt_tokens = len(source.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_retired_tokens = 0
        self.num_charged_tokens = 0
        self.num_pending = 0
        self.num_inflight = 0
        self.last_step_id = -1
        self.draft_token_ids: list[int] = []
        self.matcher = matcher
        self.epoch = 0
        self.status = RequestStatus.WAITING
        self.known_to_runner = False
        self.suspect = False

        self.leader: Request | None = None
        self.followers: list[Request] = []

        self.block_ids: list[int] = []
        self.root_hash = root_hash
        self.block_hashes: list[bytes] = []
        self.num_cached_blocks = 0
        self.num_cached_tokens = 0

        # Entry i belongs to prompt token i + 1. One sample reports them for all, and only a generation's first attempt.
        wants_prompt_logprobs = (
            sampling.prompt_logprobs is not None and sample.index == 0 and not sample.output_token_ids
        )
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if wants_prompt_logprobs else None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that a step may still compute now; 0 when the tokens being sampled are the last ones wanted."""
        if self.num_pending and self.num_output_tokens + self.num_pending >= self.max_output_tokens:
            return 0
        return len(self.token_ids) + self.num_pending - self.num_computed_tokens

    def room_after(self, num_tokens: int) -> int:
        """How many more tokens the request can have than its first `num_tokens`."""
        return self.num_prompt_tokens + self.max_output_tokens - num_tokens

    @property
    def next_prompt_logprob(self) -> int:
        """Position of the first prompt token whose log-probability is still wanted; num_prompt_tokens when none is."""
        return self.num_prompt_tokens if self.prompt_logprobs is None else len(self.prompt_logprobs) + 1

    @property
    def needs_prompt_logprobs(self) -> bool:
        """True while the prompt must really be computed, whatever the prefix cache holds."""
        return self.next_prompt_logprob < self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def __repr__(self) -> str:
        return (
            f"Request({self.key}, {self.status.value}, prompt={self.num_prompt_tokens}, output={self.num_output_tokens}, "
            f"computed={self.num_computed_tokens}, pending={self.num_pending})"
        )
