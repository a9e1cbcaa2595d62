"""Ranks of other machines: how they join, and how both sides prove that they know the same key.

    worker                                        engine, at --worker-address
           ── TCP ──▶
           ◀── Challenge(nonce)
           ── Answer(own nonce, mac, machine) ──▶   mac = HMAC-SHA256(key, "worker" ‖ version ‖ both nonces ‖ machine)
           ◀── Welcome(mac, settings)               mac = HMAC-SHA256(key, "engine" ‖ version ‖ both nonces)
           ── Joined or CannotJoin ──▶              the worker has the model, or says why not

The key, PENSTOCK_WORKER_KEY on both sides, never crosses the wire. Before the proof a peer can make the engine hold no more than a small
frame for a few seconds. Afterwards the connection is the rank's, as one to a local process is: it is neither encrypted nor are torch's own
connections between ranks, so that the network between the machines has to be trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field

import msgspec

from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError
from penstock.core.framing import FrameError, FrameSocket
from penstock.execution.runner.rank_group import Rank
from penstock.execution.runner.rank_messages import MAX_FRAME_BYTES

logger = logging.getLogger(__name__)

KEY_VARIABLE = "PENSTOCK_WORKER_KEY"
MIN_KEY_LENGTH = 16
# How long the engine waits for ranks, and how often it says so.
WAIT_S = 600.0
_SAY_S = 10.0
# A step of the proof takes a moment; looking for a model on disk may take longer, and converting a GGUF file's header too.
_PROOF_S = 5.0
_FIND_MODEL_S = 120.0
_MAX_PROOF_BYTES = 4096
_MAX_SETTINGS_BYTES = 1 << 16
_MAX_UNPROVEN = 16
_PROTOCOL = b"penstock ranks 1"
# A machine that vanishes without a word is noticed within some seconds.
_KEEPALIVE = (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3))


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    nonce: bytes


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """machine: what the worker is called, the same for all its ranks; slot: which of them this is."""

    nonce: bytes
    mac: bytes
    machine: str
    slot: int


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    mac: bytes
    settings: EngineConfig


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """wrong_key: trying again is of no use."""

    reason: str
    wrong_key: bool = False


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """From here on the connection belongs to the process of a rank."""


class CannotJoin(msgspec.Struct, frozen=True, tag="cannot_join"):
    reason: str


_from_engine = msgspec.msgpack.Decoder(Challenge | Welcome | Refused).decode
_from_worker = msgspec.msgpack.Decoder(Answer | Joined | CannotJoin).decode
_encode = msgspec.msgpack.encode


class JoinRefusedError(Exception):
    """The engine does not want this rank, at least not now."""


def worker_key() -> bytes:
    """The key of this side. Raises ConfigError when there is none, or one that could be guessed."""
    key = os.environ.get(KEY_VARIABLE, "")
    if len(key) < MIN_KEY_LENGTH:
        raise ConfigError(
            f"{KEY_VARIABLE} must have at least {MIN_KEY_LENGTH} characters, the same on the engine's machine and on those of its workers; "
            "make one with `openssl rand -hex 32`."
        )
    return key.encode()


def parse_address(address: str, name: str) -> tuple[str, int]:
    """HOST:PORT → (host, port). Raises ConfigError naming the flag `name`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"{name} must be HOST:PORT, not {address!r}.")
    return host.strip("[]"), int(port)


# ---- the engine's side ----


@dataclass
class _Arrivals:
    """Ranks that have joined, as threads that prove one peer each find them."""

    missing: int
    ranks: list[Rank] = field(default_factory=list)
    failure: str | None = None
    unproven: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)


def await_ranks(config: EngineConfig, missing: int, *, wait_s: float = WAIT_S) -> list[Rank]:
    """Listen at --worker-address until `missing` ranks have joined; those of one machine are neighbours. Raises ConfigError when the
    address or the key is wrong, a worker lacks the model, or too few have come in time."""
    key = worker_key()
    host, port = parse_address(config.worker_address, "--worker-address")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"--worker-address {config.worker_address}: cannot listen there: {error.strerror}."
        ) from error
    arrivals = _Arrivals(missing)
    with listener:
        listener.settimeout(0.2)
        where = "{}:{}".format(*listener.getsockname()[:2])
        logger.info("waiting at %s for %d more rank%s", where, missing, "" if missing == 1 else "s")
        try:
            _accept(listener, config, key, arrivals, wait_s)
        except BaseException:
            for rank in arrivals.ranks:
                rank.end()
            raise
    order = {rank.host: place for place, rank in reversed(list(enumerate(arrivals.ranks)))}
    return sorted(arrivals.ranks, key=lambda rank: (order[rank.host], rank.local_rank))


def _accept(listener: socket.socket, config: EngineConfig, key: bytes, arrivals: _Arrivals, wait_s: float) -> None:
    begun = said = time.monotonic()
    while len(arrivals.ranks) < arrivals.missing:
        if arrivals.failure is not None:
            raise ConfigError(arrivals.failure)
        now = time.monotonic()
        if now - begun > wait_s:
            raise ConfigError(
                f"{len(arrivals.ranks)} of {arrivals.missing} ranks of other machines have joined within {wait_s:g} s; run `penstock "
                f"worker --join` there, or lower --tensor-parallel-size or --pipeline-parallel-size."
            )
        if now - said > _SAY_S:
            said = now
            logger.info("waiting for ranks: %d of %d have joined", len(arrivals.ranks), arrivals.missing)
        try:
            sock, peer = listener.accept()
        except TimeoutError:
            continue
        if arrivals.unproven >= _MAX_UNPROVEN:
            sock.close()
            continue
        with arrivals.changed:
            arrivals.unproven += 1
        threading.Thread(target=_receive, args=(sock, peer[0], config, key, arrivals), daemon=True).start()


def _receive(sock: socket.socket, peer: str, config: EngineConfig, key: bytes, arrivals: _Arrivals) -> None:
    """Prove one peer and take it as a rank."""
    sock.settimeout(_PROOF_S)
    try:
        rank = _prove(sock, peer, config, key, arrivals)
    except (OSError, FrameError, msgspec.MsgspecError) as error:
        logger.warning("a worker at %s did not join: %s", peer, error)
        rank = None
    with arrivals.changed:
        arrivals.unproven -= 1
        if rank is not None and len(arrivals.ranks) < arrivals.missing:
            arrivals.ranks.append(rank)
            logger.info("rank %d of %s has joined", rank.local_rank, rank.host)
            return
    sock.close()


def _prove(sock: socket.socket, peer: str, config: EngineConfig, key: bytes, arrivals: _Arrivals) -> Rank | None:
    """The engine's side of the proof."""
    frames = FrameSocket(sock, _MAX_PROOF_BYTES)
    ours = secrets.token_bytes(32)
    frames.send(_encode(Challenge(ours)))
    answer = _from_worker(frames.receive() or b"")
    if not isinstance(answer, Answer):
        raise FrameError("it did not answer the challenge")
    machine = f"{answer.machine}:{answer.slot}".encode()
    if len(answer.nonce) != len(ours) or not hmac.compare_digest(
        answer.mac, _mac(key, b"worker", ours, answer.nonce, machine)
    ):
        frames.send(_encode(Refused(f"it has another {KEY_VARIABLE}", wrong_key=True)))
        raise FrameError(f"it has another {KEY_VARIABLE}")
    if len(arrivals.ranks) >= arrivals.missing:
        frames.send(_encode(Refused("no rank is missing")))
        return None
    welcome = _encode(Welcome(_mac(key, b"engine", ours, answer.nonce, b""), config))
    FrameSocket(sock, _MAX_SETTINGS_BYTES).send(welcome)
    sock.settimeout(_FIND_MODEL_S)
    found = _from_worker(frames.receive() or b"")
    host = f"{answer.machine} ({peer})"
    if isinstance(found, CannotJoin):
        arrivals.failure = f"the worker on {host} cannot join: {found.reason}"
        return None
    if not isinstance(found, Joined):
        raise FrameError("it did not say whether it has the model")
    sock.settimeout(None)
    _notice_silence(sock)
    return Rank(FrameSocket(sock, MAX_FRAME_BYTES), answer.slot, host=host, address=sock.getsockname()[0])


# ---- the worker's side ----


@dataclass(frozen=True)
class Joining:
    """A connection to an engine that wants a rank. Call `joined` or `cannot_join`."""

    sock: socket.socket
    settings: EngineConfig

    def joined(self) -> None:
        """The model is here; from now on the connection is for the process of the rank."""
        FrameSocket(self.sock, _MAX_PROOF_BYTES).send(_encode(Joined()))
        self.sock.settimeout(None)
        _notice_silence(self.sock)

    def cannot_join(self, reason: str) -> None:
        """Tell the engine, and close."""
        with contextlib.suppress(OSError):
            FrameSocket(self.sock, _MAX_PROOF_BYTES).send(_encode(CannotJoin(reason[:1024])))
        self.sock.close()


def join(address: str, key: bytes, machine: str, slot: int) -> Joining:
    """Offer the engine at `address` a rank of this machine. Raises OSError when nobody is there, JoinRefusedError when it wants none now,
    and ConfigError when the keys differ, on either side."""
    host, port = parse_address(address, "--join")
    sock = socket.create_connection((host, port), timeout=_PROOF_S)
    try:
        return Joining(sock, _answer(sock, address, key, machine, slot))
    except BaseException:
        sock.close()
        raise


def _answer(sock: socket.socket, address: str, key: bytes, machine: str, slot: int) -> EngineConfig:
    frames = FrameSocket(sock, _MAX_SETTINGS_BYTES)
    try:
        challenge = _from_engine(frames.receive() or b"")
        if not isinstance(challenge, Challenge):
            raise JoinRefusedError("it sent no challenge")
        ours = secrets.token_bytes(32)
        mac = _mac(key, b"worker", challenge.nonce, ours, f"{machine}:{slot}".encode())
        frames.send(_encode(Answer(ours, mac, machine, slot)))
        welcome = _from_engine(frames.receive() or b"")
    except (FrameError, msgspec.MsgspecError) as error:
        raise JoinRefusedError(f"{address} does not speak as an engine does ({error})") from error
    if isinstance(welcome, Refused):
        if welcome.wrong_key:
            raise ConfigError(f"the engine at {address} has another {KEY_VARIABLE}; give both sides the same.")
        raise JoinRefusedError(welcome.reason)
    if not isinstance(welcome, Welcome):
        raise JoinRefusedError("it sent no settings")
    if not hmac.compare_digest(welcome.mac, _mac(key, b"engine", challenge.nonce, ours, b"")):
        raise ConfigError(f"what listens at {address} does not know {KEY_VARIABLE}; it is not your engine.")
    return welcome.settings


def _mac(key: bytes, side: bytes, engine_nonce: bytes, worker_nonce: bytes, machine: bytes) -> bytes:
    # Parts of fixed length, or last.
    return hmac.digest(
        key, b"\0".join((_PROTOCOL, side)) + b"\0" + engine_nonce + worker_nonce + machine, hashlib.sha256
    )


def _notice_silence(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
