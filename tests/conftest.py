"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# A shell starts background jobs with Ctrl-C ignored, and the programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton reads this when kernels are defined. On a GPU they are compiled, and the tests of kernels run there (`pytest -m gpu`).
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
