"""`penstock worker --join HOST:PORT`: ranks of this machine for an engine on another one."""

from __future__ import annotations

import logging
import platform
import signal
import subprocess
import time

import click

from penstock.cli.options import debug_option

logger = logging.getLogger(__name__)

# Between looks at whether the engine is there, and whether a rank has ended.
_INTERVAL_S = 0.5
# After a model was not found here: somebody has to do something about it.
_AFTER_FAILURE_S = 5.0


@click.command(params=[debug_option()])
@click.option(
    "--join",
    "address",
    required=True,
    metavar="HOST:PORT",
    envvar="PENSTOCK_JOIN",
    help="The engine's --worker-address.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=None,
    help="Ranks to offer; one per GPU of this machine if not given, one on a CPU.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Verbosity of the log.",
)
def worker(address: str, ranks: int | None, log_level: str) -> int:
    """Offer this machine's GPUs, or its CPU, to an engine on another machine.

    The engine (`penstock serve MODEL --tensor-parallel-size 2 --worker-address HOST:PORT --local-ranks 1`) says which model it runs; this
    machine must have it under the same name or path. Both sides need the same PENSTOCK_WORKER_KEY in their environment. When the
    engine goes away, this command waits for it to come back, until Ctrl-C.
    """
    from penstock.core.log import configure_logging
    from penstock.execution.runner.rank_join import parse_address, worker_key

    configure_logging(log_level)
    # Ended like this or by Ctrl-C, its ranks end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parse_address(address, "--join")
    offer = Offer(address, worker_key(), ranks or _num_devices())
    logger.info("offering %d rank%s to %s", offer.num_ranks, "" if offer.num_ranks == 1 else "s", address)
    try:
        offer.keep()
    except KeyboardInterrupt:
        return 0
    finally:
        offer.end()
    return 0


class Offer:
    """`num_ranks` places of this machine, each of which is free or has the process of a rank."""

    def __init__(self, address: str, key: bytes, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._address = address
        self._key = key
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * num_ranks

    def keep(self) -> None:
        """Fill free places whenever an engine wants ranks. Raises ConfigError when the keys differ."""
        while True:
            self._reap()
            slot = next((slot for slot, process in enumerate(self._processes) if process is None), None)
            if slot is None or not self._fill(slot):
                time.sleep(_INTERVAL_S)

    def end(self) -> None:
        """End all ranks."""
        for process in self._processes:
            if process is not None:
                process.kill()
                process.wait()

    def _reap(self) -> None:
        for slot, process in enumerate(self._processes):
            if process is not None and process.poll() is not None:
                logger.info("rank %d has ended (status %d)", slot, process.returncode)
                self._processes[slot] = None

    def _fill(self, slot: int) -> bool:
        """Join with a place; False when the engine is not there, or wants no more."""
        from penstock.core.errors import PenstockError
        from penstock.execution.runner.rank_group import rank_command
        from penstock.execution.runner.rank_join import JoinRefusedError, join
        from penstock.hub import resolve_models

        try:
            joining = join(self._address, self._key, platform.node() or "worker", slot)
        except (OSError, JoinRefusedError) as error:
            logger.debug("not joined: %s", error)
            return False
        try:
            folder, _ = resolve_models(joining.settings)
        except PenstockError as error:
            logger.error("this machine lacks the engine's model: %s", error)
            joining.cannot_join(str(error))
            time.sleep(_AFTER_FAILURE_S)
            return False
        with joining.sock as sock:
            try:
                joining.joined()
            except OSError as error:
                logger.warning("the engine went away: %s", error)
                return False
            self._processes[slot] = subprocess.Popen(  # noqa: S603  our own module
                rank_command(sock.fileno(), str(folder)), stdin=subprocess.DEVNULL, pass_fds=(sock.fileno(),)
            )
        logger.info("rank %d has joined, with the model in %s", slot, folder)
        return True


def _num_devices() -> int:
    import torch

    return max(1, torch.cuda.device_count())
