"""What the executor and the processes of its ranks say to each other: typed msgpack in frames (core.framing), one connection per rank.

    executor ─▶ rank    Start ─▶ Allocate ─▶ RunStep, RunStep, … ─▶ Stop          and from Start again with another model
    rank ─▶ executor    (StoreOpened) ─▶ Loaded ─▶ Ready ─▶ Finished, Failed, … ─▶ Stopped

Nothing in a message can name code, and every length is checked before it is read. A rank whose connection ends, ends.
"""

from __future__ import annotations

import msgspec

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError, IntegrityError, ModelFormatError, PenstockError
from penstock.core.types import ModelInfo
from penstock.engine.step import RequestKey, RunnerOutput, SchedulerOutput

# A step in which hundreds of long prompts begin has some tens of MiB.
MAX_FRAME_BYTES = 1 << 28


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """Load rank `rank`'s part of the model.

    folder: where the model is; '' when this machine found it by its name. local_rank, local_ranks: among those of this machine.
    run: a name that no other start on any machine has. store: HOST:PORT of the store through which the ranks find each other; '': open it.
    address: of the network interface to talk through; '': the one of this connection. one_machine: all ranks of this stage are on one.
    progress: show how loading goes.
    """

    rank: int
    settings: EngineConfig
    folder: str
    local_rank: int
    local_ranks: int
    run: str
    store: str
    address: str
    one_machine: bool
    progress: bool = False


class Allocate(msgspec.Struct, frozen=True, tag="allocate"):
    """Take memory for a cache of so many blocks, and be ready for steps."""

    num_blocks: int
    num_host_blocks: int


class RunStep(msgspec.Struct, frozen=True, tag="step"):
    """Execute a step. `number` counts all steps since the start; `sampled_token_ids`: what was sampled since the step before was sent, for
    stages that do not sample."""

    number: int
    step: SchedulerOutput
    sampled_token_ids: dict[RequestKey, list[int]] = {}


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Finish the steps that were sent, release the model and answer Stopped."""


ToRank = Start | Allocate | RunStep | Stop


class StoreOpened(msgspec.Struct, frozen=True, tag="store"):
    """The store listens at `address`, HOST:PORT."""

    address: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The part is loaded. settings: with everything resolved. fingerprint: see ModelWorker. num_blocks, num_host_blocks: what there is room
    for, at `bytes_per_block`."""

    settings: EngineConfig
    max_inflight: int
    fingerprint: dict[str, str]
    num_blocks: int
    num_host_blocks: int
    bytes_per_block: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """Steps can come. `info` as if this rank were the whole engine."""

    info: ModelInfo
    timeline: list[tuple[str, float]]


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    """The rank cannot start; `kind` is the name of the error's class if it is one of ours."""

    kind: str
    message: str

    def error(self) -> PenstockError:
        """The error again, for raising in the engine's process."""
        kinds: dict[str, type[PenstockError]] = {cls.__name__: cls for cls in (ConfigError, ModelFormatError)}
        return kinds.get(self.kind, IntegrityError)(self.message)


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """A step is done; only the first rank of the last stage says so."""

    number: int
    output: RunnerOutput


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A step raised; `fatal`: an invariant of ours is broken."""

    number: int
    message: str
    fatal: bool


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """The model is released."""


FromRank = StoreOpened | Loaded | Ready | StartFailed | Finished | Failed | Stopped

encode = msgspec.msgpack.Encoder().encode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
