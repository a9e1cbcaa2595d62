"""The process of one rank: `python -m penstock.execution.runner.rank_process --control-fd N`.

It ends at once when the connection that it inherits does, even in the middle of an operation that waits for a rank that is gone.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import sys
import threading

from penstock.core.framing import FrameSocket
from penstock.core.log import configure_logging
from penstock.execution.runner.rank_messages import MAX_FRAME_BYTES
from penstock.execution.runner.rank_server import RankServer

# How the process ends when its connection does: there is nobody to tell.
_CONNECTION_ENDED = 3


def end_with_connection(sock: socket.socket) -> threading.Thread:
    """End this process at once when the other end of `sock` is closed or its process is gone, whatever is going on here."""

    def watch() -> None:
        poll = select.poll()
        # Not the arrival of bytes: those are for another thread.
        poll.register(sock, getattr(select, "POLLRDHUP", 0))
        poll.poll()
        os._exit(_CONNECTION_ENDED)

    thread = threading.Thread(target=watch, name="connection-watch", daemon=True)
    thread.start()
    return thread


def main(arguments: list[str]) -> int:
    """Exit status 0 when the connection ended between two messages."""
    parser = argparse.ArgumentParser(prog="python -m penstock.execution.runner.rank_process", description="One rank.")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--log-level", default="warning")
    parser.add_argument("--log-format", default="text")
    parser.add_argument("--folder", default="")
    options = parser.parse_args(arguments)
    # Ctrl-C in a terminal reaches the whole group of processes; the engine decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(options.log_level, options.log_format)
    sock = socket.socket(fileno=options.control_fd)
    end_with_connection(sock)
    try:
        RankServer(FrameSocket(sock, MAX_FRAME_BYTES), options.folder).run()
    except OSError:
        return _CONNECTION_ENDED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
