"""The processes of an engine's ranks, as its own process sees them: started, listened to, ended.

A local rank is a child process at the other end of a pair of sockets that nobody else can reach. A rank on another machine is a connection
that proved to know the key (rank_join.py). Either way a rank ends at once when its connection does, and the engine hears of its end at
once through the connection; nothing has to be asked for signs of life.
"""

from __future__ import annotations

import contextlib
import logging
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from penstock.core.errors import ConfigError, IntegrityError
from penstock.core.framing import FrameError, FrameSocket
from penstock.core.log import JsonFormatter
from penstock.execution.runner.rank_messages import (
    MAX_FRAME_BYTES,
    FromRank,
    StartFailed,
    ToRank,
    decode_from_rank,
    encode,
)

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=FromRank)

RANK_MODULE = "penstock.execution.runner.rank_process"
# A process whose connection ended is over within this time, and says how.
_LAST_BREATH_S = 0.5


@dataclass
class Rank:
    """One rank. host: its machine, '' for this one. local_rank: its number among those of its machine. address: of this machine's network
    interface towards it, '' for a local one. process: None on another machine."""

    frames: FrameSocket
    local_rank: int
    host: str = ""
    address: str = ""
    process: subprocess.Popen[bytes] | None = None
    ended: bool = field(default=False, init=False)

    def is_alive(self) -> bool:
        """Whether nobody has seen the rank end. A process of this machine is looked at."""
        return not self.ended and (self.process is None or self.process.poll() is None)

    def send(self, message: bytes) -> None:
        """A message that nobody takes any more is lost; that the rank has ended shows where it is listened to."""
        with contextlib.suppress(OSError):
            self.frames.send(message)

    def how_it_ended(self) -> str:
        """In words, once its connection has ended."""
        if self.process is None:
            return "its connection ended"
        try:
            status = self.process.wait(_LAST_BREATH_S)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if status >= 0:
            return f"exit status {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"

    def end(self) -> None:
        """End the connection and with it the rank; a local one is killed and reaped. Idempotent."""
        self.ended = True
        self.frames.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class RankGroup:
    """Ranks in their order. `close` ends all of them."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = list(ranks)

    @classmethod
    def start(cls, num_ranks: int) -> RankGroup:
        """`num_ranks` processes on this machine, which load nothing yet. Raises ConfigError when they cannot be started."""
        group = cls([])
        try:
            for local_rank in range(num_ranks):
                group.ranks.append(_start_rank(local_rank))
        except OSError as error:
            group.close()
            raise ConfigError(f"cannot start the process of a rank: {error}.") from error
        return group

    def __len__(self) -> int:
        return len(self.ranks)

    def send(self, message: ToRank) -> None:
        """Tell all ranks."""
        encoded = encode(message)
        for rank in self.ranks:
            rank.send(encoded)

    def poll(self, timeout_s: float) -> list[tuple[int, FromRank | None]]:
        """What ranks say within so many seconds, by rank; None: its connection has ended, or it cannot be understood. The end of a rank is
        told once."""
        open_ranks = {rank.frames.fileno(): index for index, rank in enumerate(self.ranks) if not rank.ended}
        readable, _, _ = select.select(list(open_ranks), [], [], timeout_s)
        news: list[tuple[int, FromRank | None]] = []
        for descriptor in readable:
            index = open_ranks[descriptor]
            news += [(index, message) for message in self._messages_of(self.ranks[index])]
        return news

    def _messages_of(self, rank: Rank) -> list[FromRank | None]:
        try:
            arrived = rank.frames.arrived()
            if arrived is not None:
                return [decode_from_rank(message) for message in arrived]
        except (OSError, FrameError) as error:
            logger.debug("the connection of a rank broke: %s", error)
        except msgspec.DecodeError as error:
            logger.error("a rank cannot be understood: %s", error)
        rank.ended = True
        return [None]

    def gather(
        self,
        kind: type[Answer],
        ranks: Sequence[int],
        name: Callable[[int], str],
        timeout_s: float,
    ) -> list[Answer]:
        """One message of `kind` from each of `ranks`, in that order. Raises the error of the first rank that cannot start, and
        ConfigError, with `name` of the rank, when one ends or takes too long."""
        answers: dict[int, Answer] = {}
        if over := [index for index in ranks if self.ranks[index].ended]:
            raise ConfigError(f"{name(over[0])} has ended: {self.ranks[over[0]].how_it_ended()}")
        deadline = time.monotonic() + timeout_s
        while missing := [index for index in ranks if index not in answers]:
            for index, message in self.poll(0.5):
                match message:
                    case StartFailed():
                        raise message.error()
                    case None:
                        raise ConfigError(
                            f"{name(index)} ended while it started: {self.ranks[index].how_it_ended()}; its messages are above"
                        )
                    case _ if isinstance(message, kind):
                        answers[index] = message
                    case _:
                        raise IntegrityError(f"{name(index)} said {type(message).__name__} while it started")
            if time.monotonic() > deadline:
                raise ConfigError(f"{name(missing[0])} was not ready after {timeout_s:g} s")
        return [answers[index] for index in ranks]

    def close(self) -> None:
        """End all ranks. Idempotent."""
        for rank in self.ranks:
            rank.end()


def rank_command(control_fd: int, folder: str = "") -> list[str]:
    """The command that runs a rank's process at the other end of `control_fd`. folder: where it finds the model; '': where the engine
    says."""
    log = logging.getLogger("penstock")
    handlers = logging.getLogger().handlers
    json_lines = any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)
    command = [sys.executable, "-m", RANK_MODULE, "--control-fd", str(control_fd)]
    command += ["--log-level", logging.getLevelName(log.getEffectiveLevel()).lower()]
    return [*command, "--log-format", "json" if json_lines else "text", "--folder", folder]


def _start_rank(local_rank: int) -> Rank:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(  # noqa: S603  our own module
                rank_command(theirs.fileno()), stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
            )
        except OSError:
            ours.close()
            raise
    return Rank(FrameSocket(ours, MAX_FRAME_BYTES), local_rank, process=process)
